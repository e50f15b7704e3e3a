//! Adapters of MoE-PEFT (github.com/TUDB-Labs/MoE-PEFT): MixLoRA and MoLA.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file;
use crate::formats::checkpoint::Checkpoint;
use crate::formats::mixture::adapter::{MixtureAdapter, check_path};
use crate::formats::mixture::read::read_tensors;
use crate::formats::peft::{
    CONFIG, LoraConfig, MOST_RANK, Parts, PeftAdapter, Target, open_tensors, pair,
};
use crate::layers::{AdapterOptions, AdapterScale, Linear, MoeLora, Routing};
use crate::ops::BalanceForm;

/// The end of the name of a gate.
const GATE: &str = ".moe_gate.weight";
/// What stands between a linear layer's path and an expert's number.
const EXPERTS: &str = ".experts.";

/// An adapter of MoE-PEFT.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoePeftAdapter {
    /// The linear layers that have experts. MoLA's have a gate each and compute what [`MoeLora`] does. MixLoRA's gates choose for a
    /// whole feed-forward part: each of its linear layers has a copy, and [`MixtureAdapter::blocks`] says so.
    pub mixture: MixtureAdapter,
    /// The linear layers with one plain pair: MixLoRA's of the attention.
    pub plain: PeftAdapter,
}

/// `adapter_config.json` as far as it changes numbers.
#[derive(Debug)]
pub(crate) struct MoePeftConfig {
    /// Whether one gate chooses for a whole block.
    mix_lora: bool,
    experts: usize,
    top_k: usize,
    /// Of plain pairs.
    plain: LoraConfig,
    /// Of experts.
    expert: AdapterOptions,
    others: Map<String, Value>,
}

/// Rank, alpha and scale from an object, or from another where it has no such key.
fn options(object: &Map<String, Value>, or: &Map<String, Value>) -> Result<AdapterOptions, String> {
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
    Ok(options)
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
        let plain = options(&object, &nothing)?;
        let plain = LoraConfig {
            rank: plain.rank,
            alpha: plain.alpha.into(),
            rank_stabilised: plain.scale == AdapterScale::RankStabilized,
            ..LoraConfig::default()
        };
        let mut others = Map::new();
        for key in ["base_model_name_or_path", "task_type"] {
            if let Some(value) = object.get(key) {
                others.insert(key.to_owned(), value.clone());
            }
        }
        Ok(Self {
            mix_lora,
            experts: whole("num_experts", None)?,
            top_k: whole("top_k", Some(2))?,
            expert: options(expert, &object)?,
            plain,
            others,
        })
    }

    fn prefix(&self) -> &'static str {
        if self.mix_lora { "mixlora." } else { "mola." }
    }
}

impl MoePeftAdapter {
    /// Reads a folder of `adapter_config.json` and `adapter_model.safetensors`. MoE-PEFT itself saves a pickle, which is not read: its
    /// tensors are to be saved as safetensors, under the same names.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read; [`Error::Format`] if one is damaged, the routing is one that this crate does not
    /// have, or a tensor is missing, of other extents than the configuration says, not finite, or of unknown meaning.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let config = MoePeftConfig::of(file::read_json(&path)?).map_err(file::damaged(&path))?;
        Self::from_checkpoint(config, &path, &open_tensors(folder)?)
    }

    /// The adapter of a configuration, which is at `path`, and an open file.
    pub(crate) fn from_checkpoint(
        config: MoePeftConfig,
        path: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let prefix = config.prefix();
        let mut unread = BTreeSet::new();
        let (mut linears, mut plain) = (BTreeSet::new(), BTreeMap::<String, Parts>::new());
        for (name, _) in checkpoint.tensors() {
            let short = name.strip_prefix(prefix).ok_or_else(|| {
                checkpoint.wrong(name, &format!("the name does not begin with {prefix}"))
            })?;
            if let Some((linear, _)) = short.split_once(EXPERTS) {
                linears.insert(linear.to_owned());
                unread.insert(short.to_owned());
            } else if short.ends_with(GATE) {
                unread.insert(short.to_owned());
            } else {
                let a = short.strip_suffix(".lora_A.weight");
                let b = short.strip_suffix(".lora_B.weight");
                let linear = a.or(b).ok_or_else(|| {
                    let reason = "neither a gate nor a matrix of an expert or of a plain pair";
                    checkpoint.wrong(name, reason)
                })?;
                check_path(linear).map_err(|reason| checkpoint.wrong(name, &reason))?;
                let parts = plain.entry(model_path(linear)).or_default();
                parts.target = Some(Target::Linear);
                let tensor = Some(checkpoint.finite_tensor(name)?);
                if a.is_some() {
                    parts.a = tensor;
                } else {
                    parts.b = tensor;
                }
            }
        }
        let mut mixture = MixtureAdapter {
            others: config.others.clone(),
            ..MixtureAdapter::default()
        };
        let reader = Reader {
            config: &config,
            path,
            checkpoint,
        };
        let mut read = BTreeSet::new();
        for linear in &linears {
            reader.linear(linear, &mut mixture, &mut read)?;
        }
        if let Some(name) = unread.difference(&read).next() {
            let reason = "no linear layer of the adapter has it";
            return Err(checkpoint.wrong(&format!("{prefix}{name}"), reason));
        }
        let pairs = plain.into_iter().map(|(path, parts)| {
            let pair = pair(&config.plain, &path, parts, checkpoint)?;
            Ok((path, pair))
        });
        let pairs = pairs.collect::<Result<BTreeMap<_, _>>>()?;
        let mut plain = PeftAdapter::of_pairs(pairs);
        plain.config.others.extend(config.others);
        Ok(Self { mixture, plain })
    }

    /// One expert of every layer that has experts, with the plain pairs of the others: see [`MixtureAdapter::expert`].
    ///
    /// # Errors
    /// As [`MixtureAdapter::expert`].
    pub fn expert(&self, expert: usize) -> Result<PeftAdapter> {
        let mut pairs = self.mixture.expert(expert)?.pairs;
        pairs.extend(self.plain.pairs.clone());
        let mut adapter = PeftAdapter::of_pairs(pairs);
        adapter.config.others.extend(self.mixture.others.clone());
        Ok(adapter)
    }
}

/// The path in a model: MoE-PEFT counts layers from inside of it.
fn model_path(path: &str) -> String {
    format!("model.{path}")
}

struct Reader<'a> {
    config: &'a MoePeftConfig,
    path: &'a Path,
    checkpoint: &'a Checkpoint,
}

impl Reader<'_> {
    /// Adds a linear layer that has experts, and says which tensors it has read.
    fn linear(
        &self,
        linear: &str,
        mixture: &mut MixtureAdapter,
        read: &mut BTreeSet<String>,
    ) -> Result<()> {
        let MoePeftConfig {
            experts, mix_lora, ..
        } = *self.config;
        let wrong = |reason: String| Error::Format {
            path: self.path.to_owned(),
            reason: format!("`{linear}`: {reason}"),
        };
        check_path(linear).map_err(wrong)?;
        let rank = self.config.expert.rank;
        let name =
            |matrix: &str, expert: usize| format!("{linear}{EXPERTS}{expert}.{matrix}.weight");
        let d_in = self.matrix(&name("lora_A", 0))?[1];
        let d_out = self.matrix(&name("lora_B", 0))?[0];
        let block = linear.rsplit_once('.').map(|(block, _)| block);
        let gate_of = if mix_lora {
            block.unwrap_or(linear)
        } else {
            linear
        };
        let gate = format!("{gate_of}{GATE}");
        // A block's gate is as wide as what the block reads.
        let gate_width = if mix_lora {
            self.matrix(&gate)?[1]
        } else {
            d_in
        };
        let routing = Routing {
            // The loss of both adds up the choices of a token.
            balance: BalanceForm::HuggingFace,
            ..Routing::new(experts, self.config.top_k)
        };
        let path = model_path(linear);
        let base = Linear::new(path.clone(), d_in, d_out);
        let layer = MoeLora::new(base, self.config.expert, routing)
            .map_err(|error| wrong(error.to_string()))?;
        let a = |expert| name("lora_A", expert);
        let b = |expert| name("lora_B", expert);
        let mut add = |parameter: &str, file: &dyn Fn(usize) -> String, count, dims: &[usize]| {
            let each = if count == 1 && parameter == "router" {
                dims
            } else {
                &dims[1..]
            };
            let full = |number| format!("{}{}", self.config.prefix(), file(number));
            let tensor = read_tensors(self.checkpoint, full, count, each, dims)?;
            read.extend((0..count).map(file));
            mixture
                .tensors
                .insert(format!("{path}.{parameter}"), tensor);
            Ok::<_, Error>(())
        };
        add("lora_a", &a, experts, &[experts, rank, d_in])?;
        add("lora_b", &b, experts, &[experts, d_out, rank])?;
        add("router", &|_| gate.clone(), 1, &[experts, gate_width])?;
        if mix_lora {
            mixture.blocks.insert(path.clone(), model_path(gate_of));
        }
        mixture.layers.insert(path, layer.into());
        Ok(())
    }

    /// The extents of a tensor that must be a matrix.
    fn matrix(&self, name: &str) -> Result<[usize; 2]> {
        let name = format!("{}{name}", self.config.prefix());
        self.checkpoint.matrix(&name)
    }
}
