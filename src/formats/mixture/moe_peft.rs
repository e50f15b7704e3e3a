//! Adapters of MoE-PEFT (github.com/TUDB-Labs/MoE-PEFT): MixLoRA and MoLA.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::checkpoint::Checkpoint;
use crate::formats::mixture::GATE;
use crate::formats::mixture::adapter::{MixtureAdapter, check_path};
use crate::formats::mixture::moe_peft_config::MoePeftConfig;
use crate::formats::mixture::read::read_tensors;
use crate::formats::peft::{Parts, PeftAdapter, Target, factor, folder, pair, without_effect};
use crate::layers::{Linear, MoeLora, Routing};
use crate::ops::BalanceForm;

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
    /// Alpha of the experts with all digits of the file; layers have 32 bits of it.
    pub expert_alpha: f64,
}

impl MoePeftAdapter {
    /// Reads a folder of `adapter_config.json` and `adapter_model.safetensors`. MoE-PEFT itself saves a pickle, which is not read: its
    /// tensors are to be saved as safetensors, under the same names.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read; [`Error::Format`] if one is damaged, the routing is one that this crate does not
    /// have, or a tensor is missing, of other extents than the configuration says, not finite, or of unknown meaning.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let opened = folder::open(folder.as_ref(), MoePeftConfig::of)?;
        Self::from_checkpoint(opened.config, &opened.path, &opened.tensors)
    }

    /// The adapter of a configuration, which is at `path`, and an open file.
    pub(crate) fn from_checkpoint(
        config: MoePeftConfig,
        path: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let names = names(&config, checkpoint)?;
        let mut unread = BTreeSet::new();
        let (mut linears, mut plain) = (BTreeSet::new(), BTreeMap::<String, Parts>::new());
        for (short, name) in &names {
            if let Some((linear, _)) = short.split_once(EXPERTS) {
                linears.insert(linear.to_owned());
                unread.insert(short.clone());
            } else if short.ends_with(GATE) {
                unread.insert(short.clone());
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
                let tensor = Some(factor(checkpoint, name)?);
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
            names: &names,
            path,
            checkpoint,
        };
        let mut read = BTreeSet::new();
        for linear in &linears {
            reader.linear(linear, &mut mixture, &mut read)?;
        }
        if let Some(name) = unread.difference(&read).next() {
            let reason = "no linear layer of the adapter has it";
            return Err(checkpoint.wrong(&reader.full(name), reason));
        }
        let pairs = plain.into_iter().map(|(path, parts)| {
            let pair = pair(&config.plain, &path, parts, checkpoint)?;
            Ok((path, pair))
        });
        let pairs = pairs.collect::<Result<BTreeMap<_, _>>>()?;
        let mut plain = PeftAdapter::of_pairs(pairs);
        plain.config.others.extend(of_peft(&config.others));
        Ok(Self {
            mixture,
            plain,
            expert_alpha: config.expert_alpha,
        })
    }

    /// One expert of every layer that has experts, with the plain pairs of the others: see [`MixtureAdapter::expert`].
    ///
    /// # Errors
    /// As [`MixtureAdapter::expert`].
    pub fn expert(&self, expert: usize) -> Result<PeftAdapter> {
        let mut pairs = self.mixture.expert(expert)?.pairs;
        for (path, pair) in &mut pairs {
            let layer = &self.mixture.layers[path];
            let (options, scale) = (layer.options(), layer.routing().map_or(1.0, |r| r.scale));
            // Unless someone has changed the layer since it was read.
            if options.alpha == self.expert_alpha as f32 {
                pair.scale = self.expert_alpha / options.divisor() * f64::from(scale);
            }
        }
        pairs.extend(self.plain.pairs.clone());
        let mut adapter = PeftAdapter::of_pairs(pairs);
        adapter.config.others.extend(of_peft(&self.mixture.others));
        Ok(adapter)
    }
}

/// Those keys that PEFT has too, without the modules that were adapted: the pairs say which.
fn of_peft(others: &Map<String, Value>) -> impl Iterator<Item = (String, Value)> {
    let keys = others.iter().filter(|(key, _)| without_effect(key));
    keys.map(|(key, value)| (key.clone(), value.clone()))
}

/// What each tensor is named today, without the prefix, and what the file calls it.
///
/// # Errors
/// [`Error::Format`] if a name does not begin with the prefix, or two are the same.
fn names(config: &MoePeftConfig, checkpoint: &Checkpoint) -> Result<BTreeMap<String, String>> {
    let prefix = config.prefix();
    let mut names = BTreeMap::new();
    for (name, _) in checkpoint.tensors() {
        let short = name.strip_prefix(prefix).ok_or_else(|| {
            checkpoint.wrong(name, &format!("the name does not begin with {prefix}"))
        })?;
        let early = if config.mix_lora {
            early_name(short)
        } else {
            None
        };
        let today = early.unwrap_or_else(|| short.to_owned());
        if let Some(other) = names.insert(today, name.to_owned()) {
            let reason = format!("`{other}` is the same under its early name");
            return Err(checkpoint.wrong(name, &reason));
        }
    }
    Ok(names)
}

/// The name of today of a tensor of the first releases of MixLoRA: `layers.{i}.gate.weight` and `layers.{i}.experts.{e}.{linear}.lora_A.weight`, the
/// linear layers by Llama's first names or by those of today.
fn early_name(short: &str) -> Option<String> {
    let mut parts = short.split('.');
    let mut next = || parts.next();
    let (Some("layers"), Some(layer)) = (next(), next()) else {
        return None;
    };
    let layer = format!("layers.{layer}.mlp");
    match [next(), next(), next(), next(), next(), next()] {
        [Some("gate"), Some("weight"), None, ..] => Some(format!("{layer}{GATE}")),
        [
            Some("experts"),
            Some(expert),
            Some(linear),
            Some(matrix),
            Some("weight"),
            None,
        ] => {
            let linear = match linear {
                "w1_proj" => "gate_proj",
                "w2_proj" => "down_proj",
                "w3_proj" => "up_proj",
                linear => linear,
            };
            Some(format!("{layer}.{linear}{EXPERTS}{expert}.{matrix}.weight"))
        }
        _ => None,
    }
}

/// The path in a model: MoE-PEFT counts layers from inside of it.
fn model_path(path: &str) -> String {
    format!("model.{path}")
}

struct Reader<'a> {
    config: &'a MoePeftConfig,
    names: &'a BTreeMap<String, String>,
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
            jitter: self.config.jitter,
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
            let full = |number| self.full(&file(number));
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

    /// What the file calls a tensor.
    fn full(&self, name: &str) -> String {
        let found = self.names.get(name).cloned();
        found.unwrap_or_else(|| format!("{}{name}", self.config.prefix()))
    }

    /// The extents of a tensor that must be a matrix.
    fn matrix(&self, name: &str) -> Result<[usize; 2]> {
        self.checkpoint.matrix(&self.full(name))
    }
}
