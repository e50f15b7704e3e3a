//! Models whose layers are mixtures of experts, read one layer at a time.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::Checkpoint;
use crate::formats::moe::config::MoeConfig;
use crate::formats::moe::latent::latent_name;
use crate::formats::moe::layout::{
    FUSED_DOWN, FUSED_GATE_UP, LATENT_EXPERT_PARTS, LATENT_GROUP_PARTS, MoeLayout,
};
use crate::formats::moe::scan::{MoeLayer, ROUTER, ROUTER_BIAS, SHARED_GATE, scan};
use crate::formats::moe::{LatentDown, LatentExperts, MoeExperts};
use crate::layers::FeedForward;
use crate::tensor::Tensor;

/// The file of a model's configuration.
const CONFIG: &str = "config.json";

/// A model's folder whose mixtures of experts were found by the names of its tensors. Files are mapped: of a layer nothing is read before it is
/// asked for.
#[derive(Debug)]
pub struct MoeModel {
    folder: PathBuf,
    checkpoint: Checkpoint,
    config: MoeConfig,
    layers: Vec<MoeLayer>,
}

/// The matrices of a shared expert.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedMatrices {
    /// `[s, n]`.
    pub gate: Tensor,
    /// `[s, n]`.
    pub up: Tensor,
    /// `[n, s]`.
    pub down: Tensor,
    /// What its output is multiplied by the sigmoid of, `[1, n]`.
    pub sigmoid_gate: Option<Tensor>,
}

impl MoeModel {
    /// Opens a folder that holds `config.json` and the model in safetensors.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; [`Error::Format`], with the tensor's name, if an expert or a router is missing, a shape does not fit the
    /// others, or the experts' tensors are of no layout that is read.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = MoeConfig::read(&folder.join(CONFIG))?;
        let checkpoint = Checkpoint::open(folder)?;
        let layers = scan(folder, &checkpoint, &config)?;
        Ok(Self {
            folder: folder.to_owned(),
            checkpoint,
            config,
            layers,
        })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All tensors of the model.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The layers that are mixtures of experts, in order; those that are dense are not listed.
    #[must_use]
    pub fn layers(&self) -> &[MoeLayer] {
        &self.layers
    }

    /// The layer of a path, such as `model.layers.0.mlp`.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is no mixture of experts.
    pub fn layer(&self, path: &str) -> Result<&MoeLayer> {
        let found = self.layers.iter().find(|layer| layer.path == path);
        found.ok_or_else(|| Error::UnknownName {
            kind: "mixture of experts",
            name: path.to_owned(),
        })
    }

    /// A tensor in 32 bits, all of whose numbers are finite.
    fn floats(&self, name: &str) -> Result<Tensor> {
        let tensor = self.checkpoint.finite_tensor(name)?;
        match tensor.as_f32() {
            Some(_) => Ok(tensor),
            None => Tensor::f32(tensor.shape(), tensor.to_f32()),
        }
    }

    /// Matrices of one shape, one behind the other.
    fn stacked(
        &self,
        names: impl ExactSizeIterator<Item = String>,
        shape: [usize; 2],
    ) -> Result<Tensor> {
        let count = names.len();
        // The headers were held against the sizes of the files: there are so many numbers.
        let mut elements = Vec::with_capacity(count * shape[0] * shape[1]);
        for name in names {
            elements.extend_from_slice(self.floats(&name)?.as_f32().unwrap_or_default());
        }
        Tensor::f32([count, shape[0], shape[1]], elements)
    }

    /// The experts of a layer, in 32 bits: so much memory is needed, and that of one expert besides (in the fused layout of all).
    ///
    /// # Errors
    /// [`Error::Format`], with the tensor's name, if a number is not finite; [`Error::Setting`] if the layer's experts are latent.
    pub fn experts(&self, layer: &MoeLayer) -> Result<MoeExperts> {
        let (e, n, m) = (layer.experts, layer.hidden, layer.intermediate);
        let path = &layer.path;
        if layer.layout == MoeLayout::Fused {
            let both = self.floats(&format!("{path}.experts.{FUSED_GATE_UP}"))?;
            let mut halves = [(); 2].map(|()| Vec::with_capacity(e * m * n));
            let each = both.as_f32().unwrap_or_default().chunks_exact(m * n);
            for (number, half) in each.enumerate() {
                halves[number % 2].extend_from_slice(half);
            }
            let [gate, up] = halves;
            return Ok(MoeExperts {
                gate: Tensor::f32([e, m, n], gate)?,
                up: Tensor::f32([e, m, n], up)?,
                down: self.floats(&format!("{path}.experts.{FUSED_DOWN}"))?,
            });
        }
        let Some([gate, up, down]) = layer.layout.projections() else {
            return Err(Error::setting(
                "experts",
                path,
                "they are latent: read them with `latent_experts`",
            ));
        };
        let names = |part: &'static str| (0..e).map(move |i| format!("{path}.experts.{i}.{part}"));
        Ok(MoeExperts {
            gate: self.stacked(names(gate), [m, n])?,
            up: self.stacked(names(up), [m, n])?,
            down: self.stacked(names(down), [n, m])?,
        })
    }

    /// The latent experts of a layer, in 32 bits, in the order of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`], with the tensor's name, if a number is not finite; [`Error::Setting`] if the layer's experts are not latent.
    pub fn latent_experts(&self, layer: &MoeLayer) -> Result<LatentExperts> {
        let (e, n, m) = (layer.experts, layer.hidden, layer.intermediate);
        let path = &layer.path;
        let Some(latent) = &layer.latent else {
            return Err(Error::setting("experts", path, "they are not latent"));
        };
        let (g, l) = (latent.groups, latent.latent);
        let of = |of: &'static str, count: usize, part: &'static str, shape| {
            let names = (0..count).map(|number| latent_name(path, of, number, part));
            self.stacked(names, shape)
        };
        let [gate_expert, up_expert, down, down_expert] = LATENT_EXPERT_PARTS;
        let [gate_latent, up_latent, down_latent] = LATENT_GROUP_PARTS;
        Ok(LatentExperts {
            gate_latent: of("groups", g, gate_latent, [l, n])?,
            up_latent: of("groups", g, up_latent, [l, n])?,
            gate_expert: of("experts", e, gate_expert, [m, l])?,
            up_expert: of("experts", e, up_expert, [m, l])?,
            down: if latent.factored_down {
                LatentDown::Factored {
                    latent: of("groups", g, down_latent, [n, l])?,
                    expert: of("experts", e, down_expert, [l, m])?,
                }
            } else {
                LatentDown::Whole(of("experts", e, down, [n, m])?)
            },
            expert_to_group: latent.expert_to_group.clone(),
        })
    }

    /// The router of a layer, `[E, n]`.
    ///
    /// # Errors
    /// [`Error::Format`] if a number is not finite.
    pub fn router(&self, layer: &MoeLayer) -> Result<Tensor> {
        self.floats(&format!("{}.{ROUTER}", layer.path))
    }

    /// The bias of a layer's choice, `[E]`, if it has one.
    ///
    /// # Errors
    /// [`Error::Format`] if a number is not finite.
    pub fn router_bias(&self, layer: &MoeLayer) -> Result<Option<Tensor>> {
        let name = format!("{}.{ROUTER_BIAS}", layer.path);
        layer.router_bias.then(|| self.floats(&name)).transpose()
    }

    /// The shared expert of a layer, if it has one.
    ///
    /// # Errors
    /// [`Error::Format`] if a number is not finite.
    pub fn shared(&self, layer: &MoeLayer) -> Result<Option<SharedMatrices>> {
        let Some(shared) = layer.shared else {
            return Ok(None);
        };
        let path = &layer.path;
        let part =
            |part: &str| self.floats(&format!("{path}.{}.{part}_proj.weight", layer.shared_name));
        let gate = format!("{path}.{SHARED_GATE}");
        let sigmoid_gate = shared.sigmoid_gate.then(|| self.floats(&gate));
        Ok(Some(SharedMatrices {
            gate: part("gate")?,
            up: part("up")?,
            down: part("down")?,
            sigmoid_gate: sigmoid_gate.transpose()?,
        }))
    }

    /// The shape of a layer's experts.
    ///
    /// # Errors
    /// As [`MoeConfig::activation`].
    pub fn feed_forward(&self, layer: &MoeLayer) -> Result<FeedForward> {
        let mut expert = FeedForward::new(layer.hidden, layer.intermediate);
        expert.activation = self.config.activation()?;
        Ok(expert)
    }
}
