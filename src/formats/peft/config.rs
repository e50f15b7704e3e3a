//! `adapter_config.json` of a LoRA adapter.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file;

/// Keys that PEFT's LoRA has beside those that this crate looks at: they change how an adapter is trained, loaded or placed, not what it computes.
const WITHOUT_EFFECT: [&str; 28] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "tie_word_embeddings",
    "trainable_token_indices",
    "velora_config",
    "bdlora_config",
];

/// What a LoRA adapter computes: `y += s B A x` on every adapted layer, its rank and alpha by the layer's name.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank, where no pattern says otherwise.
    pub rank: usize,
    /// Alpha, where no pattern says otherwise.
    pub alpha: f64,
    /// Whether the scale is alpha / √rank, not alpha / rank.
    pub rank_stabilised: bool,
    /// Ranks of layers whose names match a pattern, a regular expression for the end of the name; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas in the same way.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the weights underneath are stored `[in, out]`.
    pub fan_in_fan_out: bool,
    /// Which biases of the model were trained too: `none`, `all` or `lora_only`.
    pub bias: String,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// All other keys as they were found, to be written back.
    pub others: Map<String, Value>,
}

impl Default for LoraConfig {
    /// PEFT's defaults: rank 8, alpha 8.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            rank_stabilised: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            fan_in_fan_out: false,
            bias: "none".to_owned(),
            lora_bias: false,
            others: Map::new(),
        }
    }
}

impl LoraConfig {
    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, and as [`LoraConfig::from_json`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = file::read_text(path)?;
        Self::from_json(&json, path)
    }

    /// Reads the contents of such a file; `path` is for messages. What is not there has PEFT's default.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no object, `peft_type` is not `LORA`, a value is of the wrong kind or impossible, or the adapter is of a kind that
    /// is not read: DoRA, or one that is valid only on a changed base.
    pub fn from_json(json: &str, path: impl AsRef<Path>) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.as_ref().to_owned(),
            reason,
        };
        let object: Map<String, Value> =
            serde_json::from_str(json).map_err(|error| wrong(error.to_string()))?;
        Self::of(object).map_err(wrong)
    }

    /// The keys that PEFT does not have, as far as this release knows: kept and without effect. To be shown as a warning.
    #[must_use]
    pub fn unknown_keys(&self) -> Vec<&str> {
        let keys = self.others.keys().map(String::as_str);
        let known = |key: &str| {
            without_effect(key)
                || CHECKED.contains(&key)
                || OTHERWISE.iter().any(|(otherwise, _)| *otherwise == key)
        };
        keys.filter(|key| !known(key)).collect()
    }

    /// The rank of the layer of this name.
    ///
    /// # Errors
    /// [`Error::Setting`] if a pattern is no regular expression.
    pub fn rank_of(&self, layer: &str) -> Result<usize> {
        Ok(first_match("rank_pattern", &self.rank_pattern, layer)?.unwrap_or(self.rank))
    }

    /// Alpha of the layer of this name.
    ///
    /// # Errors
    /// [`Error::Setting`] if a pattern is no regular expression.
    pub fn alpha_of(&self, layer: &str) -> Result<f64> {
        Ok(first_match("alpha_pattern", &self.alpha_pattern, layer)?.unwrap_or(self.alpha))
    }

    /// The factor in front of B A for the layer of this name.
    ///
    /// # Errors
    /// As [`LoraConfig::rank_of`].
    pub fn scale_of(&self, layer: &str) -> Result<f64> {
        let rank = self.rank_of(layer)? as f64;
        let divisor = if self.rank_stabilised {
            rank.sqrt()
        } else {
            rank
        };
        Ok(self.alpha_of(layer)? / divisor)
    }

    /// The contents of `adapter_config.json`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut object = self.others.clone();
        let patterns = |pairs: Vec<(String, Value)>| Value::Object(pairs.into_iter().collect());
        let ranks = self.rank_pattern.iter();
        let alphas = self.alpha_pattern.iter();
        for (key, value) in [
            ("peft_type", "LORA".into()),
            ("r", self.rank.into()),
            ("lora_alpha", number(self.alpha)),
            ("use_rslora", self.rank_stabilised.into()),
            (
                "rank_pattern",
                patterns(
                    ranks
                        .map(|(key, rank)| (key.clone(), (*rank).into()))
                        .collect(),
                ),
            ),
            (
                "alpha_pattern",
                patterns(
                    alphas
                        .map(|(key, alpha)| (key.clone(), number(*alpha)))
                        .collect(),
                ),
            ),
            ("fan_in_fan_out", self.fan_in_fan_out.into()),
            ("bias", self.bias.as_str().into()),
            ("lora_bias", self.lora_bias.into()),
        ] {
            object.insert(key.to_owned(), value);
        }
        format!("{:#}\n", Value::Object(object))
    }

    /// Writes `adapter_config.json` under a temporary name beside it and renames it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        file::replace(path.as_ref(), self.to_json().as_bytes())
    }
}

/// Whether PEFT has a key that changes nothing of what an adapter computes.
pub(crate) fn without_effect(key: &str) -> bool {
    WITHOUT_EFFECT.contains(&key)
}

/// Keys that are looked at and kept as they are.
const CHECKED: [&str; 2] = ["use_dora", "init_lora_weights"];

/// Keys by which an adapter computes something else than `s B A x` on the layers of the model that it names, and what. False, null and empty they say nothing.
const OTHERWISE: [(&str, &str); 5] = [
    (
        "alora_invocation_tokens",
        "the adapter acts only behind such tokens",
    ),
    ("arrow_config", "several adapters are routed between"),
    (
        "layer_replication",
        "the adapter is for a model some of whose layers stand there several times",
    ),
    ("use_bdlora", "the matrices are block-diagonal"),
    ("use_qalora", "A reads sums of groups of inputs"),
];

/// Refuses [`OTHERWISE`].
fn check_otherwise(object: &Map<String, Value>) -> Result<(), String> {
    for (key, what) in OTHERWISE {
        let value = object.get(key).unwrap_or(&Value::Null);
        let is_nothing = value.is_null()
            || value == &Value::Bool(false)
            || value.as_array().is_some_and(Vec::is_empty);
        if !is_nothing {
            return Err(format!(
                "{key} is {value}: {what}, which this release does not compute"
            ));
        }
    }
    Ok(())
}

/// Whole numbers are written as such, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        (value as i64).into()
    } else {
        value.into()
    }
}

fn first_match<T: Copy>(
    setting: &'static str,
    patterns: &[(String, T)],
    layer: &str,
) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let whole = format!(r"^(?:.*\.)?(?:{pattern})$");
        let regex = Regex::new(&whole)
            .map_err(|error| Error::setting(setting, pattern, error.to_string()))?;
        if regex.is_match(layer) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The largest rank that is believed: beyond it a file is damaged.
pub(crate) const MOST_RANK: u64 = 1 << 20;

fn rank(key: &str, value: &Value) -> Result<usize, String> {
    match value.as_u64() {
        Some(rank) if (1..=MOST_RANK).contains(&rank) => Ok(rank as usize),
        _ => Err(format!(
            "{key} is {value}, expected a whole number from 1 to {MOST_RANK}"
        )),
    }
}

fn alpha(key: &str, value: &Value) -> Result<f64, String> {
    let number = value.as_f64().filter(|alpha| alpha.is_finite());
    number.ok_or_else(|| format!("{key} is {value}, expected a finite number"))
}

fn flag(key: &str, value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| format!("{key} is {value}, expected true or false"))
}

fn pattern<T>(
    key: &str,
    value: &Value,
    read: impl Fn(&str, &Value) -> Result<T, String>,
) -> Result<Vec<(String, T)>, String> {
    let Value::Object(object) = value else {
        return Err(format!("{key} is {value}, expected an object"));
    };
    let entries = object.iter();
    entries
        .map(|(name, value)| Ok((name.clone(), read(&format!("{key} of {name}"), value)?)))
        .collect()
}

/// Refuses an adapter that is valid only on a base that its initialisation has changed.
///
/// # Errors
/// The key, its value and the reason.
pub(crate) fn check_base(object: &Map<String, Value>) -> Result<(), String> {
    if let Some(kind) = object.get("init_lora_weights").and_then(Value::as_str) {
        let kind = kind.to_ascii_lowercase();
        let changes = ["pissa", "olora", "corda", "loftq", "lora_ga"];
        if let Some(name) = changes.iter().find(|name| kind.starts_with(*name)) {
            return Err(format!(
                "init_lora_weights is {kind:?}: a {name} adapter is valid only on the base that its initialisation has changed, not on the \
                 model it names; convert it to plain LoRA first"
            ));
        }
    }
    Ok(())
}

impl LoraConfig {
    /// The configuration of the file's object.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn of(mut object: Map<String, Value>) -> Result<Self, String> {
        match object.remove("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(other) => return Err(format!("peft_type is {other}, \"LORA\" is read here")),
            None => return Err("there is no peft_type".to_owned()),
        }
        let mut config = Self::default();
        // What is null has its default.
        let mut take = |key: &str| object.remove(key).filter(|value| !value.is_null());
        if let Some(value) = take("r") {
            config.rank = rank("r", &value)?;
        }
        if let Some(value) = take("lora_alpha") {
            config.alpha = alpha("lora_alpha", &value)?;
        }
        if let Some(value) = take("use_rslora") {
            config.rank_stabilised = flag("use_rslora", &value)?;
        }
        if let Some(value) = take("rank_pattern") {
            config.rank_pattern = pattern("rank_pattern", &value, rank)?;
        }
        if let Some(value) = take("alpha_pattern") {
            config.alpha_pattern = pattern("alpha_pattern", &value, alpha)?;
        }
        if let Some(value) = take("fan_in_fan_out") {
            config.fan_in_fan_out = flag("fan_in_fan_out", &value)?;
        }
        if let Some(value) = take("lora_bias") {
            config.lora_bias = flag("lora_bias", &value)?;
        }
        if let Some(value) = take("bias") {
            match value.as_str() {
                Some(bias @ ("none" | "all" | "lora_only")) => bias.clone_into(&mut config.bias),
                _ => return Err(format!("bias is {value}, expected none, all or lora_only")),
            }
        }
        let names = config.rank_pattern.iter().map(|(name, _)| name);
        for name in names.chain(config.alpha_pattern.iter().map(|(name, _)| name)) {
            Regex::new(name).map_err(|error| format!("the pattern `{name}`: {error}"))?;
        }
        if let Some(value) = object.get("use_dora")
            && flag("use_dora", value)?
        {
            return Err(
                "use_dora: the adapter is DoRA, which this release does not compute".to_owned(),
            );
        }
        check_base(&object)?;
        check_otherwise(&object)?;
        config.others = object;
        Ok(config)
    }
}
