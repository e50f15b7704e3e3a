//! An adapter's pairs of matrices.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::error::{Error, Result};
use crate::formats::checkpoint::{Checkpoint, RawTensor};
use crate::formats::peft::config::LoraConfig;
use crate::formats::peft::folder;
use crate::graph::ParameterStore;
use crate::layers::AdapterOptions;
use crate::tensor::{DType, Tensor, TensorType};

/// What stands before the name of every layer.
pub(crate) const PREFIX: &str = "base_model.model.";

/// What kind of layer a pair is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A linear layer: A is `[rank, d_in]`, B `[d_out, rank]`.
    Linear,
    /// An embedding: A is `[rank, vocabulary]`, B `[width, rank]`.
    Embedding,
}

/// The two matrices of an adapted layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// What kind of layer it is.
    pub target: Target,
    /// `[rank, d_in]`.
    pub a: Tensor,
    /// `[d_out, rank]`.
    pub b: Tensor,
    /// The bias of B, `[d_out]`, with `lora_bias`.
    pub bias: Option<Tensor>,
    /// The factor in front of B A.
    pub scale: f64,
}

impl LoraPair {
    /// The rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.b.shape().last()
    }

    /// Rank and alpha for this crate's layers, whose scale is alpha / rank.
    #[must_use]
    pub fn options(&self) -> AdapterOptions {
        AdapterOptions::new(self.rank(), self.alpha() as f32)
    }

    /// Alpha, where the scale is alpha / rank.
    fn alpha(&self) -> f64 {
        self.scale * self.rank() as f64
    }
}

/// An adapter as PEFT keeps it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PeftAdapter {
    /// What `adapter_config.json` says.
    pub config: LoraConfig,
    /// The pairs by the path of their layer, such as `model.layers.0.self_attn.q_proj`.
    pub pairs: BTreeMap<String, LoraPair>,
    /// Other tensors under their whole names: modules that were trained whole (`modules_to_save`), biases of the model.
    pub others: BTreeMap<String, Tensor>,
}

/// A part of a pair, by the end of its tensor's name.
const PARTS: [(&str, Target, Part); 5] = [
    (".lora_A.weight", Target::Linear, Part::A),
    (".lora_B.weight", Target::Linear, Part::B),
    (".lora_B.bias", Target::Linear, Part::Bias),
    (".lora_embedding_A", Target::Embedding, Part::A),
    (".lora_embedding_B", Target::Embedding, Part::B),
];

/// What DoRA's tensors have in their names.
const MAGNITUDE: &str = ".lora_magnitude_vector";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    A,
    B,
    Bias,
}

/// What is found of a pair.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) target: Option<Target>,
    pub(crate) a: Option<Tensor>,
    pub(crate) b: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
}

impl PeftAdapter {
    /// An adapter of these pairs, with a configuration that gives each its rank and its scale.
    #[must_use]
    pub fn of_pairs(pairs: BTreeMap<String, LoraPair>) -> Self {
        let mut config = LoraConfig::default();
        if let Some(pair) = pairs.values().next() {
            config.rank = pair.rank();
            config.alpha = pair.alpha();
        }
        config.lora_bias = pairs.values().any(|pair| pair.bias.is_some());
        // A pattern is for the ends of names: the longest first, so that none is for a layer that has its own.
        let mut layers: Vec<(&String, &LoraPair)> = pairs.iter().collect();
        layers.sort_by_key(|(layer, _)| std::cmp::Reverse(layer.len()));
        let ranks = layers.iter().map(|(_, pair)| pair.rank());
        let different_ranks = ranks.clone().any(|rank| rank != config.rank);
        let alphas = layers.iter().map(|(_, pair)| pair.alpha());
        let different_alphas = alphas.clone().any(|alpha| alpha != config.alpha);
        let names = layers.iter().map(|(layer, _)| regex::escape(layer));
        if different_ranks {
            config.rank_pattern = names.clone().zip(ranks).collect();
        }
        if different_alphas {
            config.alpha_pattern = names.zip(alphas).collect();
        }
        let targets: Vec<&str> = pairs.keys().map(String::as_str).collect();
        let targets = serde_json::Value::from(targets);
        config.others.insert("target_modules".to_owned(), targets);
        Self {
            config,
            pairs,
            others: BTreeMap::new(),
        }
    }

    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read; [`Error::Format`] if one is damaged, the adapter is of a kind that is not read (see
    /// [`LoraConfig::from_json`]), a matrix has no partner, a rank is not what the configuration says, or a number is not finite.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let opened = folder::open(folder.as_ref(), LoraConfig::of)?;
        Self::from_checkpoint(opened.config, &opened.tensors)
    }

    /// The adapter of a configuration and an open file.
    pub(crate) fn from_checkpoint(config: LoraConfig, checkpoint: &Checkpoint) -> Result<Self> {
        let wrong = |reason: String| checkpoint.fault(reason);
        let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
        let mut others = BTreeMap::new();
        for (name, _) in checkpoint.tensors() {
            if name.contains(MAGNITUDE) {
                let reason = "the adapter is DoRA, which this release does not compute";
                return Err(checkpoint.wrong(name, reason));
            }
            let found = PARTS
                .iter()
                .find_map(|(end, target, part)| Some((name.strip_suffix(end)?, *target, *part)));
            let Some((layer, target, part)) = found else {
                others.insert(name.to_owned(), checkpoint.finite_tensor(name)?);
                continue;
            };
            let tensor = factor(checkpoint, name)?;
            let Some(layer) = layer.strip_prefix(PREFIX) else {
                let reason = format!("the name does not begin with {PREFIX}");
                return Err(checkpoint.wrong(name, &reason));
            };
            let entry = parts.entry(layer.to_owned()).or_default();
            if entry.target.is_some_and(|other| other != target) {
                return Err(wrong(format!(
                    "`{layer}` is adapted as a linear layer and as an embedding"
                )));
            }
            entry.target = Some(target);
            let place = match part {
                Part::A => &mut entry.a,
                Part::B => &mut entry.b,
                Part::Bias => &mut entry.bias,
            };
            *place = Some(tensor);
        }
        let pairs = parts
            .into_iter()
            .map(|(layer, parts)| {
                let pair = pair(&config, &layer, parts, checkpoint)?;
                Ok((layer, pair))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            config,
            pairs,
            others,
        })
    }

    /// Writes an adapter's folder, which is made if it is not there. While the files are exchanged for those of an older adapter the folder has no
    /// configuration: if the writer is killed then, it is not read as an adapter, and is to be written again.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written; [`Error::Setting`] if the configuration gives a pair another rank or scale than it has, or no bias where it has one
    /// (PEFT would compute something else), the matrices of a pair do not fit together, or the configuration or a name would be read otherwise or not at
    /// all; [`Error::TypeMismatch`] if a matrix is of integers, [`Error::NotFinite`] if an element is not finite in 32 bits.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let config = self.config.to_json();
        self.check_readable(&config)?;
        for (layer, pair) in &self.pairs {
            let (rank, scale) = (self.config.rank_of(layer)?, self.config.scale_of(layer)?);
            // Adapters of fused experts hold the ranks of all experts in one matrix.
            let of_experts = self.config.has_fused_experts() && pair.rank().is_multiple_of(rank);
            if rank != pair.rank() && !of_experts {
                return Err(Error::Setting {
                    setting: "rank",
                    value: rank.to_string(),
                    reason: format!("the pair of `{layer}` has rank {}", pair.rank()),
                });
            }
            // Neither is a NaN or infinite where this holds.
            let equal = (scale - pair.scale).abs() <= 1e-6 * scale.abs().max(1e-30);
            if !equal {
                return Err(Error::Setting {
                    setting: "scale",
                    value: scale.to_string(),
                    reason: format!("the pair of `{layer}` has {}", pair.scale),
                });
            }
            fit(&pair.a, &pair.b, pair.bias.as_ref())
                .map_err(|reason| Error::setting("pair", layer, reason))?;
        }
        let mut tensors = Vec::new();
        for (layer, pair) in &self.pairs {
            let mut parts = vec![(Part::A, &pair.a), (Part::B, &pair.b)];
            parts.extend(pair.bias.as_ref().map(|bias| (Part::Bias, bias)));
            for (part, tensor) in parts {
                let end = PARTS
                    .iter()
                    .find(|(_, target, other)| *target == pair.target && *other == part);
                let Some((end, ..)) = end else {
                    return Err(Error::Setting {
                        setting: "lora_bias",
                        value: layer.clone(),
                        reason: "an embedding has no bias".to_owned(),
                    });
                };
                let name = format!("{PREFIX}{layer}{end}");
                if tensor.dtype() == DType::I32 {
                    return Err(Error::TypeMismatch {
                        name,
                        expected: TensorType::f32(tensor.shape().clone()),
                        found: tensor.ty(),
                    });
                }
                tensors.push(finite(name, tensor)?);
            }
        }
        for (name, tensor) in &self.others {
            tensors.push(finite(name.clone(), tensor)?);
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        folder::write(folder, &tensors, metadata, &config)
    }

    /// What is written must be read as it was.
    fn check_readable(&self, config: &str) -> Result<()> {
        let odd = |reason: String| Error::setting("adapter_config.json", "this adapter's", reason);
        let object = serde_json::from_str(config).map_err(|error| odd(error.to_string()))?;
        if LoraConfig::of(object).map_err(odd)? != self.config {
            return Err(odd("it would be read as another one".to_owned()));
        }
        for name in self.others.keys() {
            if name.contains(MAGNITUDE) || PARTS.iter().any(|(end, ..)| name.ends_with(end)) {
                let reason = "a tensor of this name is read as part of an adapted layer";
                return Err(Error::setting("others", name, reason));
            }
        }
        for (layer, pair) in &self.pairs {
            if pair.bias.is_some() && !self.config.lora_bias {
                let reason = format!("the pair of `{layer}` has a bias");
                return Err(Error::setting("lora_bias", false, reason));
            }
        }
        Ok(())
    }

    /// Puts the pairs of all linear layers into a store as `LAYER.lora_a` and `LAYER.lora_b`, the names that [`Lora`](crate::layers::Lora)
    /// has for a layer of that path.
    ///
    /// # Errors
    /// [`Error::Setting`] if a pair has a bias, which that layer has no place for; [`Error::TypeMismatch`] if the store has another shape under such a name, [`Error::OutOfMemory`] if the device is full.
    pub fn load_into(&self, store: &ParameterStore) -> Result<()> {
        if let Some((layer, _)) = self.pairs.iter().find(|(_, pair)| pair.bias.is_some()) {
            let reason = "its B has a bias, which no LoRA layer here has";
            return Err(Error::setting("lora_bias", layer, reason));
        }
        for (layer, pair) in &self.pairs {
            if pair.target == Target::Linear {
                store.insert(&format!("{layer}.lora_a"), &pair.a)?;
                store.insert(&format!("{layer}.lora_b"), &pair.b)?;
            }
        }
        Ok(())
    }
}

/// A tensor to be written in 32 bits.
pub(crate) fn floats(name: String, tensor: &Tensor) -> RawTensor<'_> {
    let bytes = match tensor.as_f32() {
        Some(floats) => Cow::Borrowed(bytemuck::cast_slice(floats)),
        None => Cow::Owned(bytemuck::cast_slice(&tensor.to_f32()).to_vec()),
    };
    RawTensor {
        name,
        dtype: Dtype::F32,
        shape: tensor.shape().dims().to_vec(),
        bytes,
    }
}

/// A tensor to be written: floats that are finite in 32 bits, or whole numbers as they are.
fn finite(name: String, tensor: &Tensor) -> Result<RawTensor<'_>> {
    if let Some(numbers) = tensor.as_i32() {
        return Ok(RawTensor {
            name,
            dtype: Dtype::I32,
            shape: tensor.shape().dims().to_vec(),
            bytes: Cow::Borrowed(bytemuck::cast_slice(numbers)),
        });
    }
    let raw = floats(name, tensor);
    let mut elements = raw.bytes.chunks_exact(4);
    let odd = elements.position(|bytes| {
        let element = bytes.try_into().map(f32::from_le_bytes);
        element.is_ok_and(|element| !element.is_finite())
    });
    match odd {
        None => Ok(raw),
        Some(element) => Err(Error::NotFinite {
            value: format!("`{}`", raw.name),
            element,
        }),
    }
}

/// A matrix of an adapter as a file has it.
///
/// # Errors
/// As [`Checkpoint::finite_tensor`], and [`Error::Format`] if its elements are integers: those of a quantised adapter, which mean something else
/// than they say.
pub(crate) fn factor(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    match checkpoint.entry(name).map(|entry| entry.dtype) {
        None | Some(Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
            checkpoint.finite_tensor(name)
        }
        Some(other) => {
            let reason = format!(
                "elements of type {other:?}; F64, F32, F16 and BF16 are read in an adapter"
            );
            Err(checkpoint.wrong(name, &reason))
        }
    }
}

/// Whether A, B and the bias of B are a pair; if not, why. One for both ways: what is written is read.
fn fit(a: &Tensor, b: &Tensor, bias: Option<&Tensor>) -> Result<(), String> {
    let (&[rank, d_in], &[d_out, other]) = (a.shape().dims(), b.shape().dims()) else {
        return Err(format!(
            "lora_A {} and lora_B {} are no matrices; convolutions are not read",
            a.shape(),
            b.shape()
        ));
    };
    if [rank, d_in, d_out].contains(&0) {
        return Err(format!(
            "lora_A {} and lora_B {} hold nothing",
            a.shape(),
            b.shape()
        ));
    }
    if rank != other {
        return Err(format!(
            "lora_A {} and lora_B {} have different ranks",
            a.shape(),
            b.shape()
        ));
    }
    if let Some(bias) = bias
        && bias.shape().dims() != [d_out]
    {
        return Err(format!(
            "the bias of lora_B is {}, expected [{d_out}]",
            bias.shape()
        ));
    }
    Ok(())
}

/// The pair of a layer, of a configuration and a file.
pub(crate) fn pair(
    config: &LoraConfig,
    layer: &str,
    parts: Parts,
    checkpoint: &Checkpoint,
) -> Result<LoraPair> {
    let wrong = |reason: String| Err(checkpoint.fault(reason));
    let Parts { target, a, b, bias } = parts;
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (None, _) => return wrong(format!("`{layer}` has no lora_A")),
        (_, None) => return wrong(format!("`{layer}` has no lora_B")),
    };
    if let Err(reason) = fit(&a, &b, bias.as_ref()) {
        return wrong(format!("`{layer}`: {reason}"));
    }
    if bias.is_some() && !config.lora_bias {
        return wrong(format!(
            "`{layer}`: lora_B has a bias, the configuration says lora_bias false"
        ));
    }
    let rank = b.shape().last();
    // Adapters of fused experts hold the ranks of all experts in one matrix.
    let expected = config.rank_of(layer)?;
    if rank != expected && !(config.has_fused_experts() && rank.is_multiple_of(expected)) {
        return wrong(format!(
            "`{layer}` has rank {rank}, the configuration says {expected}"
        ));
    }
    Ok(LoraPair {
        target: target.unwrap_or(Target::Linear),
        a,
        b,
        bias,
        scale: config.scale_of(layer)?,
    })
}
