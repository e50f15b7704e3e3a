//! `adapter_config.json` of MoE-PEFT.

use serde_json::{Map, Value};

use crate::formats::mixture::options::is_taken;
use crate::formats::peft::{LoraConfig, MOST_RANK, check_base};
use crate::layers::{AdapterOptions, AdapterScale};

/// `adapter_config.json` as far as it changes numbers.
#[derive(Debug)]
pub(crate) struct MoePeftConfig {
    /// Whether one gate chooses for a whole block.
    pub(crate) mix_lora: bool,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Of the router's input, in training.
    pub(crate) jitter: f32,
    /// Of plain pairs.
    pub(crate) plain: LoraConfig,
    /// Of experts.
    pub(crate) expert: AdapterOptions,
    /// Alpha of experts, with all digits.
    pub(crate) expert_alpha: f64,
    /// What is kept, as it changes nothing here.
    pub(crate) others: Map<String, Value>,
}

/// Keys that are looked at, and not kept.
const READ: [&str; 18] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "routing_strategy",
    "num_experts",
    "top_k",
    "jitter_noise",
    "expert_lora",
    "act_fn",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    // The tensors say which modules are adapted.
    "target_modules",
];

/// Keys of MoE-PEFT that say how an adapter was trained or what it is called.
const OF_TRAINING: [&str; 12] = [
    "name",
    "task_name",
    "lora_init",
    "router_loss",
    "router_aux_loss_coef",
    "router_dyn_loss_coef",
    "router_z_loss_coef",
    "router_init_range",
    "entropy_index",
    "entropy_type",
    "entropy_eps",
    "init_lora_weights",
];

/// Whether MoE-PEFT has a key that changes nothing of what an adapter computes.
pub(crate) fn of_training(key: &str) -> bool {
    OF_TRAINING.contains(&key)
}

/// Keys that change what an adapter computes, why they are refused, and the value at which they change nothing.
const REFUSED: [(&str, &str, Neutral); 7] = [
    (
        "act_fn",
        "experts with another activation than the base model's are not computed; if it is the base model's, remove the key",
        Neutral::Nothing,
    ),
    ("bias", "biases are not read", Neutral::None),
    ("lora_bias", "biases of B are not read", Neutral::False),
    (
        "fan_in_fan_out",
        "transposed weights are not read",
        Neutral::False,
    ),
    (
        "rank_pattern",
        "all experts have one rank",
        Neutral::Nothing,
    ),
    (
        "alpha_pattern",
        "all experts have one alpha",
        Neutral::Nothing,
    ),
    (
        "modules_to_save",
        "modules that were trained whole are not read",
        Neutral::Nothing,
    ),
];

/// What a key may be that changes nothing, beside null.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Neutral {
    /// An empty list or object.
    Nothing,
    /// The word none.
    None,
    False,
}

impl Neutral {
    fn is(self, value: &Value) -> bool {
        match value {
            Value::Null => true,
            Value::Array(list) => self == Self::Nothing && list.is_empty(),
            Value::Object(object) => self == Self::Nothing && object.is_empty(),
            Value::Bool(flag) => self == Self::False && !flag,
            Value::String(word) => self == Self::None && word == "none",
            Value::Number(_) => false,
        }
    }
}

/// Refuses what would change the computation and is not computed.
fn check_keys(object: &Map<String, Value>) -> Result<(), String> {
    for (key, reason, neutral) in REFUSED {
        if let Some(value) = object.get(key)
            && !neutral.is(value)
        {
            return Err(format!("{key} is {value}: {reason}"));
        }
    }
    check_base(object)
}

/// The keys that are kept.
fn kept(object: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let mut kept = Map::new();
    for (key, value) in object {
        if READ.contains(&key.as_str()) {
            continue;
        }
        if is_taken(key) {
            return Err(format!(
                "{key} is {value}: MoE-PEFT has no such key, and in rankmix's own layout it has a meaning"
            ));
        }
        kept.insert(key.clone(), value.clone());
    }
    Ok(kept)
}

/// Rank, alpha and scale from an object, or from another where it has no such key; alpha once more, with all digits.
fn options(
    object: &Map<String, Value>,
    or: &Map<String, Value>,
) -> Result<(AdapterOptions, f64), String> {
    let value = |key: &str| {
        let found = object.get(key).or_else(|| or.get(key));
        found.filter(|value| !value.is_null())
    };
    let flag = |key: &str| match value(key) {
        None => Ok(false),
        Some(found) => {
            let wrong = || format!("{key} is {found}, expected true or false");
            found.as_bool().ok_or_else(wrong)
        }
    };
    let number = |key: &str| match value(key) {
        None => Ok(None),
        Some(found) => {
            let finite = found.as_f64().filter(|number| number.is_finite());
            let wrong = || format!("{key} is {found}, expected a finite number");
            finite.map(Some).ok_or_else(wrong)
        }
    };
    if flag("use_dora")? {
        return Err(
            "use_dora: the adapter is DoRA, which this release does not compute".to_owned(),
        );
    }
    let rank = value("r").and_then(Value::as_u64);
    let Some(rank) = rank.filter(|rank| (1..=MOST_RANK).contains(rank)) else {
        let found = value("r").map_or("missing".to_owned(), Value::to_string);
        return Err(format!(
            "r is {found}, expected a whole number from 1 to {MOST_RANK}"
        ));
    };
    let alpha = number("lora_alpha")?.ok_or("lora_alpha is missing")?;
    if !(alpha as f32).is_finite() {
        return Err(format!("lora_alpha is {alpha}, the limit is {}", f32::MAX));
    }
    let mut options = AdapterOptions::new(rank as usize, alpha as f32);
    options.dropout = number("lora_dropout")?.unwrap_or(0.0) as f32;
    if flag("use_rslora")? {
        options.scale = AdapterScale::RankStabilized;
    }
    Ok((options, alpha))
}

/// The width of the router's noise.
fn jitter(value: Option<&Value>) -> Result<f32, String> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(0.0);
    };
    let jitter = value.as_f64().map(|jitter| jitter as f32);
    jitter
        .filter(|jitter| (0.0..1.0).contains(jitter))
        .ok_or_else(|| {
            format!("jitter_noise is {value}, expected a number of at least 0 and below 1")
        })
}

impl MoePeftConfig {
    /// Reads the object of the file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn of(object: Map<String, Value>) -> Result<Self, String> {
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        let mix_lora = match text("peft_type") {
            Some("MIXLORA") => true,
            Some("MOLA") => false,
            _ => {
                let found = object.get("peft_type").unwrap_or(&Value::Null);
                return Err(format!(
                    "peft_type is {found}, MIXLORA and MOLA are read here"
                ));
            }
        };
        // `mixtral` is what the first releases of MixLoRA called it.
        let known: &[&str] = if mix_lora {
            &["mixlora", "mixtral"]
        } else {
            &["mola"]
        };
        match text("routing_strategy") {
            Some(strategy) if known.contains(&strategy) => {}
            None if !mix_lora => {}
            other => {
                return Err(format!(
                    "routing_strategy is {other:?}; {} is read, which takes the top_k experts with renormalised gates",
                    known.join(" or ")
                ));
            }
        }
        let whole = |key: &str, missing: Option<u64>| {
            let found = object.get(key).filter(|value| !value.is_null());
            let number = found.map_or(missing, Value::as_u64);
            let number = number.filter(|number| (1..=1 << 16).contains(number));
            number.map(|number| number as usize).ok_or_else(|| {
                let found = found.map_or("missing".to_owned(), Value::to_string);
                format!("{key} is {found}, expected a whole number from 1 to 65536")
            })
        };
        let nothing = Map::new();
        let expert = match object.get("expert_lora") {
            None | Some(Value::Null) => &nothing,
            Some(Value::Object(expert)) => expert,
            Some(other) => return Err(format!("expert_lora is {other}, expected an object")),
        };
        check_keys(&object)?;
        check_keys(expert)?;
        let mut others = kept(&object)?;
        let of_expert = kept(expert)?;
        if !of_expert.is_empty() {
            others.insert("expert_lora".to_owned(), Value::Object(of_expert));
        }
        let (plain, alpha) = options(&object, &nothing)?;
        let plain = LoraConfig {
            rank: plain.rank,
            alpha,
            rank_stabilised: plain.scale == AdapterScale::RankStabilized,
            ..LoraConfig::default()
        };
        let jitter = if mix_lora {
            jitter(object.get("jitter_noise"))?
        } else if let Some(value) = object.get("jitter_noise") {
            return Err(format!("jitter_noise is {value}: MoLA has no such key"));
        } else {
            0.0
        };
        let (expert, expert_alpha) = options(expert, &object)?;
        Ok(Self {
            mix_lora,
            experts: whole("num_experts", None)?,
            top_k: whole("top_k", Some(2))?,
            jitter,
            plain,
            expert,
            expert_alpha,
            others,
        })
    }

    pub(crate) fn prefix(&self) -> &'static str {
        if self.mix_lora { "mixlora." } else { "mola." }
    }
}
