//! How checkpoints name the tensors of a mixture of experts.

use serde::{Deserialize, Serialize};

/// One of the layouts that experts are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoeLayout {
    /// Mixtral: `block_sparse_moe.experts.{e}.w1`, `w3`, `w2` are gate, up and down.
    Mixtral,
    /// Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek: `mlp.experts.{e}.gate_proj`, `up_proj`, `down_proj`.
    PerExpert,
    /// Version 5 of transformers: `mlp.experts.gate_up_proj` `[E, 2m, n]`, the rows of gate first, and `mlp.experts.down_proj` `[E, n, m]`.
    Fused,
    /// Ours, of latent experts.
    Latent,
}

/// The last tensors' names of the fused layout.
pub(crate) const FUSED_GATE_UP: &str = "gate_up_proj";
/// See [`FUSED_GATE_UP`].
pub(crate) const FUSED_DOWN: &str = "down_proj";

impl MoeLayout {
    /// What it is called in text.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixtral => "Mixtral",
            Self::PerExpert => "an expert each (Qwen-MoE, OLMoE, DeepSeek)",
            Self::Fused => "fused (transformers 5)",
            Self::Latent => "latent experts (rankmix)",
        }
    }

    /// The names of gate, up and down behind `experts.{e}.`, for the two layouts that have them.
    pub(crate) fn projections(self) -> Option<[&'static str; 3]> {
        match self {
            Self::Mixtral => Some(["w1.weight", "w3.weight", "w2.weight"]),
            Self::PerExpert => Some(["gate_proj.weight", "up_proj.weight", "down_proj.weight"]),
            Self::Fused | Self::Latent => None,
        }
    }

    /// The layout whose tensors have such names behind `experts.`, if there is one.
    pub(crate) fn of(rest: &str) -> Option<Self> {
        if rest == FUSED_GATE_UP || rest == FUSED_DOWN {
            return Some(Self::Fused);
        }
        let (expert, part) = rest.split_once('.')?;
        expert.parse::<usize>().ok()?;
        let of_latent = LATENT_EXPERT_PARTS.contains(&part);
        [Self::Mixtral, Self::PerExpert]
            .into_iter()
            .find(|layout| {
                let known = layout.projections();
                known.is_some_and(|parts| parts.contains(&part))
            })
            .or(of_latent.then_some(Self::Latent))
    }
}

/// What our layout has behind `experts.{e}.`: gate and up `[m, l]`, and `down.weight` `[n, m]` or `down_expert.weight` `[l, m]`.
pub(crate) const LATENT_EXPERT_PARTS: [&str; 4] = [
    "gate_expert.weight",
    "up_expert.weight",
    "down.weight",
    "down_expert.weight",
];

/// What our layout has behind `groups.{g}.`: gate and up `[l, n]`, and `down_latent.weight` `[n, l]` where down is factored.
pub(crate) const LATENT_GROUP_PARTS: [&str; 3] = [
    "gate_latent.weight",
    "up_latent.weight",
    "down_latent.weight",
];
