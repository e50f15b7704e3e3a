//! What all low-rank adapters have in common.

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::layers::Linear;
use crate::ops::check_dropout;

/// How alpha becomes the factor in front of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AdapterScale {
    /// `alpha / rank`.
    #[default]
    Standard,
    /// `alpha / √rank` (rsLoRA).
    RankStabilized,
}

/// Rank, scale and dropout of a low-rank adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterOptions {
    /// The rank.
    pub rank: usize,
    /// Alpha: the adapter is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// What that becomes.
    pub scale: AdapterScale,
    /// The probability with which an element of what A reads is dropped, in graphs that train
    /// ([`Graph::set_training`]); 0 is none. As in PEFT it concerns the adapter's path alone: neither the layer
    /// underneath nor a gate that looks at the layer's input, and experts that share an input share its mask.
    pub dropout: f32,
}

impl AdapterOptions {
    /// A rank and an alpha, the factor being `alpha / rank`.
    #[must_use]
    pub fn new(rank: usize, alpha: f32) -> Self {
        Self {
            rank,
            alpha,
            scale: AdapterScale::Standard,
            dropout: 0.0,
        }
    }

    /// The same options, with dropout in training.
    #[must_use]
    pub fn with_dropout(mut self, probability: f32) -> Self {
        self.dropout = probability;
        self
    }

    /// What alpha is divided by.
    pub(crate) fn divisor(&self) -> f64 {
        let rank = self.rank as f64;
        match self.scale {
            AdapterScale::Standard => rank,
            AdapterScale::RankStabilized => rank.sqrt(),
        }
    }

    /// The factor in front of the adapter.
    #[must_use]
    pub fn factor(&self) -> f32 {
        match self.scale {
            AdapterScale::Standard => self.alpha / self.rank as f32,
            AdapterScale::RankStabilized => self.alpha / (self.rank as f32).sqrt(),
        }
    }

    /// What A reads: `x`, in training with dropout.
    pub(crate) fn adapter_input(&self, graph: &mut Graph, x: Value) -> Result<Value> {
        if graph.is_training() {
            graph.dropout(x, self.dropout)
        } else {
            Ok(x)
        }
    }

    pub(crate) fn check(&self, base: &Linear) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting(
                "rank",
                self.rank,
                "an adapter needs at least rank 1",
            ));
        }
        if !self.alpha.is_finite() {
            return Err(Error::setting("alpha", self.alpha, "must be finite"));
        }
        check_dropout(self.dropout)?;
        if base.d_in == 0 || base.d_out == 0 {
            return Err(Error::setting(
                "d_in, d_out",
                format!("{}, {}", base.d_in, base.d_out),
                "must be at least 1",
            ));
        }
        Ok(())
    }
}
