//! What a conversion into core experts did and lost.

use serde::{Deserialize, Serialize};

/// The largest relative error that counts as lossless: what rounding to 32 bits leaves.
const LOSSLESS: f64 = 1e-6;

/// One expert of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoreExpertReport {
    /// Where it is from: the adapter's name, or the number of the expert.
    pub source: String,
    /// The rank it had; 0 if the adapter leaves this layer alone, and the core is zeros.
    pub rank: usize,
    /// The factor it had in front of B A.
    pub scale: f64,
    /// ‖X - Y‖ / ‖X‖ of the change X of the weight and what became of it, in Frobenius norms, of what is written. What is below about 1e-8 cannot be told from 0.
    pub relative_error: f64,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoreLayerReport {
    /// The path of the linear layer.
    pub layer: String,
    /// The width of its input.
    pub d_in: usize,
    /// The width of its output.
    pub d_out: usize,
    /// The ranks of all experts together.
    pub summed_ranks: usize,
    /// How many independent directions the experts' A have.
    pub independent_a: usize,
    /// How many independent directions the experts' B have.
    pub independent_b: usize,
    /// The rank of the CoMoL layer: the width of its bases.
    pub rank: usize,
    /// The part of the energy of all A inside the basis.
    pub kept_energy_a: f64,
    /// The part of the energy of all B inside the basis.
    pub kept_energy_b: f64,
    /// Whether every expert is what it was, up to rounding.
    pub lossless: bool,
    /// ‖W - W'‖ / ‖W‖ of the router and what it became where it now looks at the latent; `None` if it looks at the input as before, or is new.
    pub router_error: Option<f64>,
    /// Elements of the experts' matrices and gates before.
    pub elements_before: usize,
    /// Elements of all parameters after.
    pub elements_after: usize,
    /// The experts.
    pub experts: Vec<CoreExpertReport>,
}

impl CoreLayerReport {
    /// The largest relative error of an expert.
    #[must_use]
    pub fn largest_error(&self) -> f64 {
        let errors = self.experts.iter().map(|expert| expert.relative_error);
        errors.fold(0.0, f64::max)
    }

    pub(super) fn with_verdict(mut self) -> Self {
        self.lossless = self.largest_error() <= LOSSLESS;
        self
    }
}

/// A whole conversion.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreReport {
    /// The layers in the order of their paths.
    pub layers: Vec<CoreLayerReport>,
    /// Whether every layer is lossless.
    pub lossless: bool,
    /// The largest relative error of an expert of any layer.
    pub largest_error: f64,
    /// What the result has no place for, by name: embeddings, biases, modules trained whole, rotations.
    pub left_out: Vec<String>,
    /// The base models that the sources name, each once.
    pub base_models: Vec<String>,
}

impl CoreReport {
    pub(super) fn new(
        layers: Vec<CoreLayerReport>,
        left_out: Vec<String>,
        base_models: Vec<String>,
    ) -> Self {
        let errors = layers.iter().map(CoreLayerReport::largest_error);
        Self {
            lossless: layers.iter().all(|layer| layer.lossless),
            largest_error: errors.fold(0.0, f64::max),
            layers,
            left_out,
            base_models,
        }
    }
}
