//! A layer as the files keep it: what it is, and which parameters it has under which names.

use std::fmt;

use crate::error::Result;
use crate::layers::{
    AdapterOptions, CoMol, CoreRouting, GateInput, Linear, MoeLora, RotMole, Routing,
};

/// The kinds of mixtures; `peft_type` in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MixtureKind {
    /// LoRA experts with a gate.
    MoeLora,
    /// LoRA experts with a gate and rotations.
    RotMole,
    /// Core experts between one pair of matrices.
    CoMol,
}

impl MixtureKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::MoeLora, Self::RotMole, Self::CoMol];

    /// What `peft_type` says.
    #[must_use]
    pub fn peft_type(self) -> &'static str {
        match self {
            Self::MoeLora => "MOE_LORA",
            Self::RotMole => "ROTMOLE",
            Self::CoMol => "COMOL",
        }
    }
}

impl fmt::Display for MixtureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MoeLora => "MoE-LoRA",
            Self::RotMole => "RotMoLE",
            Self::CoMol => "CoMoL",
        })
    }
}

/// A mixture of low-rank experts on a linear layer: the description that builds it.
#[derive(Clone, Debug, PartialEq)]
pub enum MixtureLayer {
    /// LoRA experts with a gate.
    MoeLora(MoeLora),
    /// LoRA experts with a gate and rotations.
    RotMole(RotMole),
    /// Core experts between one pair of matrices.
    CoMol(CoMol),
}

impl From<MoeLora> for MixtureLayer {
    fn from(layer: MoeLora) -> Self {
        Self::MoeLora(layer)
    }
}

impl From<RotMole> for MixtureLayer {
    fn from(layer: RotMole) -> Self {
        Self::RotMole(layer)
    }
}

impl From<CoMol> for MixtureLayer {
    fn from(layer: CoMol) -> Self {
        Self::CoMol(layer)
    }
}

/// One parameter of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// The path of the layer, or the name that several share it under.
    pub(crate) path: String,
    /// What the parameter's name in a store ends in.
    pub(crate) parameter: &'static str,
    /// What the tensor's name in a file ends in. Where it has `{e}`, the first extent is that of experts, and each has a tensor of its own.
    pub(crate) file: &'static str,
    /// The extents.
    pub(crate) dims: Vec<usize>,
}

/// Where an expert's number stands in [`Part::file`].
const EXPERT: &str = "{e}";

impl Part {
    /// The name in a store.
    pub(crate) fn store_name(&self) -> String {
        format!("{}.{}", self.path, self.parameter)
    }

    /// How many tensors of a file it is, and the extents of each.
    pub(crate) fn tensors(&self) -> (usize, &[usize]) {
        match self.dims.split_first() {
            Some((experts, each)) if self.file.contains(EXPERT) => (*experts, each),
            _ => (1, &self.dims),
        }
    }

    /// The name of one of the tensors in a file, without PEFT's prefix.
    pub(crate) fn file_name(&self, expert: usize) -> String {
        let file = self.file.replace(EXPERT, &expert.to_string());
        format!("{}.{file}", self.path)
    }
}

impl MixtureLayer {
    /// What it is.
    #[must_use]
    pub fn kind(&self) -> MixtureKind {
        match self {
            Self::MoeLora(_) => MixtureKind::MoeLora,
            Self::RotMole(_) => MixtureKind::RotMole,
            Self::CoMol(_) => MixtureKind::CoMol,
        }
    }

    /// The layer underneath.
    #[must_use]
    pub fn base(&self) -> &Linear {
        match self {
            Self::MoeLora(layer) => &layer.base,
            Self::RotMole(layer) => &layer.mixture.base,
            Self::CoMol(layer) => &layer.base,
        }
    }

    /// The layer on a frozen base, as it comes back from a file.
    pub(crate) fn frozen(&self) -> Self {
        let mut layer = self.clone();
        let base = match &mut layer {
            Self::MoeLora(layer) => &mut layer.base,
            Self::RotMole(layer) => &mut layer.mixture.base,
            Self::CoMol(layer) => &mut layer.base,
        };
        base.trainable = false;
        layer
    }

    /// Rank, scale and dropout.
    #[must_use]
    pub fn options(&self) -> &AdapterOptions {
        match self {
            Self::MoeLora(layer) => &layer.options,
            Self::RotMole(layer) => &layer.mixture.options,
            Self::CoMol(layer) => &layer.options,
        }
    }

    /// How tokens find their experts; `None` if each takes all of them (CoMoL with a dense gate).
    #[must_use]
    pub fn routing(&self) -> Option<&Routing> {
        match self {
            Self::MoeLora(layer) => Some(&layer.routing),
            Self::RotMole(layer) => Some(&layer.mixture.routing),
            Self::CoMol(layer) => layer.sparse.as_ref(),
        }
    }

    /// How many experts there are.
    #[must_use]
    pub fn experts(&self) -> usize {
        match self {
            Self::CoMol(layer) => layer.experts,
            Self::MoeLora(_) | Self::RotMole(_) => self.routing().map_or(0, |r| r.experts),
        }
    }

    /// The names and extents of the parameters that the adapter has in a store: those of the layer but for its base's.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) or [`Error::Limit`](crate::Error::Limit) if the rank does not suit a rotation.
    pub fn parameters(&self) -> Result<Vec<(String, Vec<usize>)>> {
        let parts = self.parts()?.into_iter();
        Ok(parts.map(|part| (part.store_name(), part.dims)).collect())
    }

    pub(crate) fn parts(&self) -> Result<Vec<Part>> {
        let base = self.base();
        let (rank, experts) = (self.options().rank, self.experts());
        let part = |path: &str, parameter, file, dims: &[usize]| Part {
            path: path.to_owned(),
            parameter,
            file,
            dims: dims.to_vec(),
        };
        let own = |parameter, file, dims: &[usize]| part(&base.name, parameter, file, dims);
        let router_width = match self {
            Self::CoMol(layer) if layer.routing == CoreRouting::Core => rank,
            _ => base.d_in,
        };
        let mut parts = vec![own("router", "moe_gate.weight", &[experts, router_width])];
        if self.routing().is_some_and(|routing| routing.selection_bias) {
            parts.push(own("router_bias", "moe_gate.bias", &[experts]));
        }
        match self {
            Self::CoMol(layer) => {
                let a = layer.shared_a.as_ref().unwrap_or(&base.name);
                let b = layer.shared_b.as_ref().unwrap_or(&base.name);
                parts.push(part(a, "lora_a", "lora_A.weight", &[rank, base.d_in]));
                parts.push(part(b, "lora_b", "lora_B.weight", &[base.d_out, rank]));
                parts.push(own("core", "core", &[experts, rank, rank]));
            }
            Self::MoeLora(_) | Self::RotMole(_) => {
                let (a, b) = ("experts.{e}.lora_A.weight", "experts.{e}.lora_B.weight");
                parts.push(own("lora_a", a, &[experts, rank, base.d_in]));
                parts.push(own("lora_b", b, &[experts, base.d_out, rank]));
            }
        }
        if let Self::RotMole(layer) = self {
            let numbers = layer.rotation.numbers(rank)?;
            let gate = |width| {
                let file = "rotation_gate.{e}.weight";
                own("rotation_gate", file, &[experts, numbers, width])
            };
            parts.push(match layer.gate_input {
                GateInput::Input => gate(base.d_in),
                GateInput::Latent => gate(rank),
                GateInput::Static => {
                    let name = "rotation_generator";
                    own(name, name, &[experts, numbers])
                }
            });
        }
        Ok(parts)
    }
}
