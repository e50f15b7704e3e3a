//! One expert of a mixture as a plain LoRA adapter.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::formats::mixture::adapter::MixtureAdapter;
use crate::formats::mixture::layer::{MixtureLayer, Part};
use crate::formats::peft::{LoraPair, PeftAdapter, Target};
use crate::layers::GateInput;
use crate::tensor::Tensor;

impl MixtureAdapter {
    /// One expert of every layer as a plain LoRA adapter, its gate taken as 1 times the routing's scale, which the pair's scale holds. With
    /// renormalised gates that is what the layers compute for tokens that take this expert alone; without, their gate is the expert's score,
    /// which no LoRA has, and smaller than 1.
    ///
    /// Of a [`RotMole`](crate::layers::RotMole) whose rotations are [static](crate::layers::GateInput::Static) it is A and B R; of another, whose
    /// rotation depends on the token as no LoRA does, the expert at rotation 0. Of a [`CoMol`](crate::layers::CoMol) it is A and B Mᵀ; A is
    /// repeated where layers share it.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no layer, or one has no such expert; [`Error::NotFinite`] if B R or B Mᵀ is not finite in 32 bits; and
    /// as [`MixtureAdapter::check`].
    pub fn expert(&self, expert: usize) -> Result<PeftAdapter> {
        if self.layers.is_empty() {
            let reason = "the adapter has 0 experts: no layer is a mixture";
            return Err(Error::setting("expert", expert, reason));
        }
        self.pairs(|path, layer| {
            if expert >= layer.experts() {
                let reason = format!("`{path}` has {} experts, counted from 0", layer.experts());
                return Err(Error::setting("expert", expert, reason));
            }
            match layer {
                MixtureLayer::MoeLora(_) | MixtureLayer::RotMole(_) => {
                    self.expert_matrices(path, layer, expert)
                }
                MixtureLayer::CoMol(_) => {
                    let mut gates = vec![0.0; layer.experts()];
                    gates[expert] = 1.0;
                    self.merged_pair(path, layer, &gates)
                }
            }
        })
    }

    /// A and B of one expert of a layer that is no CoMoL, a static rotation taken into B.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if B R is not finite in 32 bits.
    pub(crate) fn expert_matrices(
        &self,
        path: &str,
        layer: &MixtureLayer,
        expert: usize,
    ) -> Result<[Tensor; 2]> {
        let matrix = |name| matrix_of(&self.tensors[&format!("{path}.{name}")], expert);
        let (a, b) = (matrix("lora_a")?, matrix("lora_b")?);
        match layer {
            MixtureLayer::RotMole(rotated) if rotated.gate_input == GateInput::Static => {
                let generator = &self.tensors[&format!("{path}.rotation_generator")];
                let rotations = rotated.static_rotations(generator)?;
                let rotation = matrix_of(&rotations, expert)?.to_f64();
                Ok([a, times_transposed(path, &b, &rotation)?])
            }
            _ => Ok([a, b]),
        }
    }

    /// The cores of every CoMoL layer merged by these gates, one for each expert, as a plain LoRA adapter: A and B (Σ g M)ᵀ.
    ///
    /// # Errors
    /// [`Error::Setting`] if the layers are no CoMoL or have another number of experts, and as [`MixtureAdapter::check`].
    pub fn merged_cores(&self, gates: &[f32]) -> Result<PeftAdapter> {
        self.pairs(|path, layer| {
            if !matches!(layer, MixtureLayer::CoMol(_)) {
                let reason = format!("`{path}` has no cores that could be merged");
                return Err(Error::setting("layer", layer.kind(), reason));
            }
            if gates.len() != layer.experts() {
                let reason = format!("`{path}` has {} experts", layer.experts());
                return Err(Error::setting("gates", gates.len(), reason));
            }
            self.merged_pair(path, layer, gates)
        })
    }

    fn pairs(
        &self,
        matrices: impl Fn(&str, &MixtureLayer) -> Result<[Tensor; 2]>,
    ) -> Result<PeftAdapter> {
        self.check()?;
        let mut pairs = BTreeMap::new();
        for (path, layer) in &self.layers {
            let [a, b] = matrices(path, layer)?;
            let gate = layer.routing().map_or(1.0, |routing| routing.scale);
            let options = layer.options();
            let pair = LoraPair {
                target: Target::Linear,
                a,
                b,
                bias: None,
                scale: f64::from(options.alpha) / options.divisor() * f64::from(gate),
            };
            pairs.insert(path.clone(), pair);
        }
        let mut adapter = PeftAdapter::of_pairs(pairs);
        if let Some(base) = self.others.get("base_model_name_or_path") {
            let key = "base_model_name_or_path".to_owned();
            adapter.config.others.insert(key, base.clone());
        }
        Ok(adapter)
    }

    /// A and B Cᵀ with C = Σ g M.
    fn merged_pair(&self, path: &str, layer: &MixtureLayer, gates: &[f32]) -> Result<[Tensor; 2]> {
        let matrices = layer.parts()?;
        let of = |parameter: &str| {
            let part = matrices.iter().find(|part| part.parameter == parameter);
            let name = part.map_or_else(|| format!("{path}.{parameter}"), Part::store_name);
            let tensor = self.tensors.get(&name);
            tensor.ok_or(Error::UnknownName {
                kind: "parameter",
                name,
            })
        };
        let rank = layer.options().rank;
        let cores = of("core")?.to_f64();
        let mut core = vec![0.0_f64; rank * rank];
        for (gate, expert) in gates.iter().zip(cores.chunks_exact(rank * rank)) {
            for (sum, element) in core.iter_mut().zip(expert) {
                *sum += f64::from(*gate) * element;
            }
        }
        let b = times_transposed(path, of("lora_b")?, &core)?;
        Ok([of("lora_a")?.clone(), b])
    }
}

/// B Cᵀ, C square: (B Cᵀ)[o][i] = Σ_j B[o][j] C[i][j].
fn times_transposed(path: &str, b: &Tensor, c: &[f64]) -> Result<Tensor> {
    let rank = b.shape().last();
    let product = b
        .to_f64()
        .chunks_exact(rank)
        .fold(Vec::new(), |mut all, row| {
            let rows = c.chunks_exact(rank);
            all.extend(rows.map(|c| row.iter().zip(c).map(|(b, c)| b * c).sum::<f64>() as f32));
            all
        });
    let product = Tensor::f32(b.shape(), product)?;
    match product.first_not_finite() {
        None => Ok(product),
        Some(element) => Err(Error::NotFinite {
            value: format!("B of `{path}` times the expert's matrix"),
            element,
        }),
    }
}

/// The matrix of one expert.
fn matrix_of(stacked: &Tensor, expert: usize) -> Result<Tensor> {
    let dims = &stacked.shape().dims()[1..];
    let each = dims.iter().product::<usize>();
    let elements = stacked.to_f32()[expert * each..(expert + 1) * each].to_vec();
    Tensor::f32(dims, elements)
}
