//! What a model's `config.json` says of its experts and their router.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file;
use crate::layers::{Routing, SharedExpert};
use crate::ops::{Activation, Score};

/// The key of `config.json` that says what a model with latent experts has.
pub(crate) const LATENT_KEY: &str = "rankmix_latent_moe";
/// The version of our layout that is written, and the only one that is read.
pub const LATENT_LAYOUT_VERSION: u32 = 1;
/// The names that families have for the number of experts a token takes.
const TOP_K: [&str; 4] = [
    "num_experts_per_tok",
    "moe_topk",
    "moe_top_k",
    "num_experts_per_token",
];

/// The names that families have for the number of experts.
const EXPERT_COUNTS: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];

/// What `config.json` says of latent experts, under `rankmix_latent_moe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatentConfig {
    /// [`LATENT_LAYOUT_VERSION`] of the crate that wrote it.
    pub format_version: u32,
    /// Groups in each layer.
    pub groups: usize,
    /// Width of the latents.
    pub latent: usize,
    /// Whether the down projections are factored too.
    pub factored_down: bool,
    /// The group of each expert, by the path of the layer.
    pub expert_to_group: std::collections::BTreeMap<String, Vec<usize>>,
}

/// A model's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl MoeConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::Format`] if it is no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let keys = file::read_json(path)?;
        Ok(Self {
            path: path.to_owned(),
            keys,
        })
    }

    /// Every key.
    #[must_use]
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    pub(crate) fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::Format {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// A key that is there and not null; models of text and pictures have those of the text in an object of their own.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        let of_text = || self.keys.get("text_config").and_then(|text| text.get(key));
        let found = self.keys.get(key).filter(|value| !value.is_null());
        found.or_else(of_text).filter(|value| !value.is_null())
    }

    pub(crate) fn typed<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let typed = serde_json::from_value(value.clone());
        typed
            .map(Some)
            .map_err(|error| self.wrong(format!("`{key}` = {value}: {error}")))
    }

    /// The kind of model (`model_type`), if it is said.
    #[must_use]
    pub fn model_type(&self) -> &str {
        self.value("model_type")
            .and_then(Value::as_str)
            .unwrap_or("")
    }

    /// How many experts a token takes.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not said, or no positive number.
    pub fn top_k(&self) -> Result<usize> {
        for key in TOP_K {
            match self.typed::<usize>(key)? {
                Some(0) => return Err(self.wrong(format!("`{key}` = 0: must be at least 1"))),
                Some(top_k) => return Ok(top_k),
                None => {}
            }
        }
        Err(self.wrong(format!(
            "says nowhere how many experts a token takes: none of {} is there",
            TOP_K.join(", ")
        )))
    }

    /// Checks what it says of a layer's experts against the layer as its tensors are.
    ///
    /// # Errors
    /// [`Error::Format`] if their number is another, or the shared expert or its gate is missing.
    pub(crate) fn check_layer(
        &self,
        path: &str,
        experts: usize,
        shared: Option<SharedExpert>,
    ) -> Result<()> {
        for key in EXPERT_COUNTS {
            if let Some(count) = self.typed::<usize>(key)?
                && count != experts
            {
                return Err(self.wrong(format!(
                    "`{key}` = {count}, and the router of `{path}` has {experts} experts"
                )));
            }
        }
        let wanted = self.typed::<usize>("n_shared_experts")?.unwrap_or(0);
        if wanted > 0 && shared.is_none() {
            return Err(self.wrong(format!(
                "`n_shared_experts` = {wanted}, and `{path}` has no `shared_experts`"
            )));
        }
        if self.model_type() == "qwen2_moe" {
            let missing = match shared {
                None => "shared_expert.up_proj.weight",
                Some(shared) if !shared.sigmoid_gate => "shared_expert_gate.weight",
                Some(_) => return Ok(()),
            };
            return Err(self.wrong(format!(
                "a \"qwen2_moe\" has a shared expert and a gate for it, and `{path}` has no `{missing}`"
            )));
        }
        Ok(())
    }

    /// What experts do in their middle.
    ///
    /// # Errors
    /// [`Error::Format`] if it is something else than SiLU or a form of GELU.
    pub fn activation(&self) -> Result<Activation> {
        let name: Option<String> = self.typed("hidden_act")?;
        match name.as_deref() {
            None | Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(self.wrong(format!(
                "`hidden_act` = \"{other}\": silu, gelu and gelu_pytorch_tanh are computed"
            ))),
        }
    }

    /// How tokens find their experts, of which there are so many, with or without a bias of the choice.
    ///
    /// # Errors
    /// [`Error::Format`] if a token takes more experts than there are, or the router is of a kind that [`Routing`] does not compute: a choice
    /// limited to some groups of experts, other scores than softmax and sigmoid; [`Error::Setting`] if its numbers make no sense.
    pub fn routing(&self, experts: usize, bias: bool) -> Result<Routing> {
        let family = self.model_type();
        let top_k = self.top_k()?;
        if top_k > experts {
            return Err(self.wrong(format!(
                "a token takes {top_k} experts, and there are {experts}"
            )));
        }
        let mut routing = Routing::new(experts, top_k);
        let score: Option<String> = self.typed("scoring_func")?;
        routing.score = match score.as_deref() {
            Some("sigmoid") => Score::Sigmoid,
            // Only routers by sigmoids have such a bias.
            None if bias || family == "deepseek_v3" => Score::Sigmoid,
            Some("softmax") | None => Score::Softmax,
            Some(other) => {
                return Err(self.wrong(format!(
                    "`scoring_func` = \"{other}\": softmax and sigmoid are computed"
                )));
            }
        };
        if family == "deepseek_v3" && !bias {
            return Err(self.wrong(
                "a \"deepseek_v3\" router chooses by a bias, and there is no `gate.e_score_correction_bias`"
                    .to_owned(),
            ));
        }
        routing.selection_bias = bias;
        let normalised: Option<bool> = self.typed("norm_topk_prob")?;
        routing.renormalize = match (family, normalised) {
            // Mixtral has no such key and does it always. Others that name their matrices as it does route otherwise.
            ("mixtral", _) | ("deepseek_v3", None) => true,
            (_, Some(normalised)) => normalised,
            ("qwen2_moe" | "qwen3_moe" | "olmoe" | "deepseek_v2", None) => false,
            (_, None) => {
                return Err(self.wrong(format!(
                    "`norm_topk_prob` is missing, and what a `model_type` \"{family}\" does without it is not known"
                )));
            }
        };
        routing.scale = match self.typed("routed_scaling_factor")? {
            Some(scale) => scale,
            // What transformers takes.
            None if family == "deepseek_v3" => 2.5,
            None => 1.0,
        };
        // Implementations of DeepSeek-V2 differ in whether weights that were normalised are scaled; its releases do one of the two.
        if family == "deepseek_v2" && routing.renormalize && routing.scale != 1.0 {
            return Err(self.wrong(format!(
                "`norm_topk_prob` together with `routed_scaling_factor` = {} means different things for \"deepseek_v2\"",
                routing.scale
            )));
        }
        self.check_groups_of_choice()?;
        routing.check()?;
        Ok(routing)
    }

    /// A choice that is limited to `topk_group` of `n_group` groups is not computed.
    fn check_groups_of_choice(&self) -> Result<()> {
        let method: Option<String> = self.typed("topk_method")?;
        // What transformers takes.
        let [no_groups, no_choice] = match self.model_type() {
            "deepseek_v3" => [Some(8), Some(4)],
            _ => [None, None],
        };
        let groups = self.typed::<usize>("n_group")?.or(no_groups).unwrap_or(1);
        let chosen = self.typed::<usize>("topk_group")?.or(no_choice);
        let chosen = chosen.unwrap_or(groups);
        if method.as_deref() == Some("greedy") || groups <= 1 || chosen >= groups {
            return Ok(());
        }
        Err(self.wrong(format!(
            "`n_group` = {groups}, `topk_group` = {chosen}: routing to some groups of experts is not computed"
        )))
    }

    /// What is said of latent experts, if the model has any.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not what this release writes.
    pub fn latent(&self) -> Result<Option<LatentConfig>> {
        let Some(value) = self.keys.get(LATENT_KEY) else {
            return Ok(None);
        };
        let version = value.get("format_version").and_then(Value::as_u64);
        if version != Some(u64::from(LATENT_LAYOUT_VERSION)) {
            return Err(self.wrong(format!(
                "`{LATENT_KEY}`: version {LATENT_LAYOUT_VERSION} is read, `format_version` is {}",
                version.map_or_else(|| "missing".to_owned(), |version| version.to_string())
            )));
        }
        self.typed(LATENT_KEY)
    }
}
