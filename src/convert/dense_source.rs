//! Where dense feed-forwards come from: a Llama-like model in safetensors, or a GGUF file of the Llama family.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::convert::DenseFeedForward;
use crate::convert::source::{copy_others, facts, identity, identity_at};
use crate::convert::stage::REPORT;
use crate::error::{Error, Result};
use crate::file;
use crate::formats::{Checkpoint, Dtype, GgufFile, GgufValue, OutputTensor};
use crate::tensor::Tensor;

/// A model whose feed-forwards are dense.
pub(crate) enum DenseSource {
    /// `model.layers.{i}.mlp.{gate,up,down}_proj.weight`.
    Safetensors {
        folder: PathBuf,
        checkpoint: Checkpoint,
    },
    /// `blk.{i}.ffn_{gate,up,down}.weight`.
    Gguf { path: PathBuf, file: GgufFile },
}

/// The feed-forwards of a model, all of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DenseLayers {
    /// They are numbered from 0.
    pub(crate) count: usize,
    /// n.
    pub(crate) hidden: usize,
    /// m.
    pub(crate) neurons: usize,
}

/// A tensor that is written as the source has it.
pub(crate) struct Kept {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
}

const PARTS: [&str; 3] = ["gate", "up", "down"];
/// The keys of `config.json` that families say their activation by.
const ACTIVATION_KEYS: [&str; 2] = ["hidden_act", "hidden_activation"];
/// The architectures of GGUF whose feed-forward is `down (silu(gate x) * (up x))`.
const GATED_BY_SILU: [&str; 4] = ["llama", "mistral3", "qwen2", "qwen3"];

impl DenseSource {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            return Ok(Self::Gguf {
                path: path.to_owned(),
                file: GgufFile::open(path)?,
            });
        }
        Ok(Self::Safetensors {
            folder: path.to_owned(),
            checkpoint: Checkpoint::open(path)?,
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors { folder, .. } => folder,
            Self::Gguf { path, .. } => path,
        }
    }

    /// The file that [`DenseSource::config`] is read from.
    pub(crate) fn config_path(&self) -> PathBuf {
        match self {
            Self::Safetensors { folder, .. } => folder.join("config.json"),
            Self::Gguf { path, .. } => path.clone(),
        }
    }

    fn name(&self, layer: usize, part: &str) -> String {
        match self {
            Self::Safetensors { .. } => format!("model.layers.{layer}.mlp.{part}_proj.weight"),
            Self::Gguf { .. } => format!("blk.{layer}.ffn_{part}.weight"),
        }
    }

    fn norm_name(&self, layer: usize) -> String {
        match self {
            Self::Safetensors { .. } => written_norm(layer),
            Self::Gguf { .. } => format!("blk.{layer}.ffn_norm.weight"),
        }
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Safetensors { checkpoint, .. } => {
                Box::new(checkpoint.tensors().map(|(name, _)| name))
            }
            Self::Gguf { file, .. } => Box::new(file.tensors().iter().map(|(name, _)| &**name)),
        }
    }

    /// The tensors of the layers, by the layer's number and what is behind it.
    pub(crate) fn of_layers(&self) -> impl Iterator<Item = (usize, &str)> {
        let before = match self {
            Self::Safetensors { .. } => "model.layers.",
            Self::Gguf { .. } => "blk.",
        };
        self.names().filter_map(move |name| {
            let (number, rest) = name.strip_prefix(before)?.split_once('.')?;
            Some((number.parse().ok()?, rest))
        })
    }

    /// The feed-forwards, as the headers of the files say: nothing else is read.
    ///
    /// # Errors
    /// [`Error::Format`], with the tensor's name and the file, if there is none, one lacks a matrix or has another shape than the others, a layer has something else in its
    /// place or beside it (biases, experts), or numbers that are no floats.
    pub(crate) fn layers(&self) -> Result<DenseLayers> {
        let mut numbers = BTreeSet::new();
        for (layer, rest) in self.of_layers() {
            let prefixes: &[&str] = match self {
                Self::Safetensors { .. } => &["mlp.", "block_sparse_moe."],
                Self::Gguf { .. } => &["ffn_"],
            };
            if !prefixes.iter().any(|prefix| rest.starts_with(prefix)) {
                continue;
            }
            let whole = match self {
                Self::Safetensors { .. } => format!("model.layers.{layer}.{rest}"),
                Self::Gguf { .. } => format!("blk.{layer}.{rest}"),
            };
            if PARTS.iter().any(|part| whole == self.name(layer, part)) {
                numbers.insert(layer);
            } else if whole != self.norm_name(layer) {
                let reason = if rest.ends_with(".bias") {
                    "experts have no biases"
                } else {
                    "this is none of the gate, up and down projections that a dense feed-forward is split by"
                };
                return Err(self.wrong(&whole, reason));
            }
        }
        let count = numbers.len();
        if count == 0 {
            let name = self.name(0, "gate");
            return Err(file::damaged(self.path())(format!(
                "there is no dense feed-forward: no tensor `{name}`"
            )));
        }
        if let Some(layer) = (0..count).find(|layer| !numbers.contains(layer)) {
            return Err(self.wrong(
                &self.name(layer, "gate"),
                "it is missing, and there are later layers",
            ));
        }
        let [neurons, hidden] = self.matrix(&self.name(0, "gate"))?;
        for layer in 0..count {
            for (part, expected) in
                PARTS
                    .into_iter()
                    .zip([[neurons, hidden], [neurons, hidden], [hidden, neurons]])
            {
                let name = self.name(layer, part);
                let found = self.matrix(&name)?;
                if found != expected {
                    return Err(self.wrong(
                        &name,
                        &format!(
                            "{found:?}: {expected:?} is expected, by `{}`",
                            self.name(0, "gate")
                        ),
                    ));
                }
            }
        }
        Ok(DenseLayers {
            count,
            hidden,
            neurons,
        })
    }

    /// Checks the norms before the feed-forwards, by the headers.
    ///
    /// # Errors
    /// [`Error::Format`], with the tensor's name and the file, if one is missing or of another width.
    pub(crate) fn check_norms(&self, layers: DenseLayers) -> Result<()> {
        for layer in 0..layers.count {
            let name = self.norm_name(layer);
            let shape = self.shape(&name)?;
            if shape != [layers.hidden] {
                let expected = [layers.hidden];
                return Err(self.wrong(&name, &format!("{shape:?}: {expected:?} is expected")));
            }
        }
        Ok(())
    }

    /// What is wrong with a tensor, with its name and file.
    fn wrong(&self, name: &str, reason: &str) -> Error {
        match self {
            Self::Safetensors { checkpoint, .. } => checkpoint.wrong(name, reason),
            Self::Gguf { path, .. } => file::damaged(path)(format!("tensor `{name}`: {reason}")),
        }
    }

    /// The extents of a tensor of floats.
    fn shape(&self, name: &str) -> Result<&[usize]> {
        let missing = || self.wrong(name, "it is missing");
        match self {
            Self::Safetensors { checkpoint, .. } => {
                let entry = checkpoint.entry(name).ok_or_else(missing)?;
                match entry.dtype {
                    Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(&entry.shape),
                    other => Err(self.wrong(
                        name,
                        &format!("elements of type {other:?}; F64, F32, F16 and BF16 are split"),
                    )),
                }
            }
            Self::Gguf { file, .. } => {
                let mut tensors = file.tensors().iter();
                let found = tensors.find(|(other, _)| other == name);
                let (_, tensor) = found.ok_or_else(missing)?;
                // Refused with the name if it is of a type that is not read; nothing is read yet.
                file.raw(name)?;
                Ok(&tensor.shape)
            }
        }
    }

    fn matrix(&self, name: &str) -> Result<[usize; 2]> {
        let shape = self.shape(name)?;
        <[usize; 2]>::try_from(shape)
            .map_err(|_| self.wrong(name, &format!("{shape:?} is no matrix")))
    }

    /// A tensor in 32 bits whose elements are all finite.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self {
            Self::Safetensors { checkpoint, .. } => checkpoint.finite_tensor(name),
            Self::Gguf { file, .. } => {
                let tensor = file.tensor(name)?;
                match tensor.first_not_finite() {
                    None => Ok(tensor),
                    Some(element) => Err(self.wrong(
                        name,
                        &format!("holds a NaN or an infinity (element {element})"),
                    )),
                }
            }
        }
    }

    /// The matrices of a layer, in 32 bits.
    ///
    /// # Errors
    /// [`Error::Format`], with the tensor's name and the file, if a number is not finite.
    pub(crate) fn feed_forward(&self, layer: usize) -> Result<DenseFeedForward> {
        let [gate, up, down] = PARTS.map(|part| self.tensor(&self.name(layer, part)));
        Ok(DenseFeedForward {
            gate: gate?,
            up: up?,
            down: down?,
        })
    }

    /// The weights of the norm before the feed-forward.
    pub(crate) fn norm(&self, layer: usize) -> Result<Tensor> {
        self.tensor(&self.norm_name(layer))
    }

    /// What the experts' matrices are written in: the type of 16 bits that all three of the layer have, or 32 bits.
    pub(crate) fn dtype(&self, layer: usize) -> Dtype {
        let Self::Safetensors { checkpoint, .. } = self else {
            return Dtype::F32;
        };
        let [gate, up, down] = PARTS.map(|part| {
            let entry = checkpoint.entry(&self.name(layer, part));
            entry.map(|entry| entry.dtype)
        });
        gate.filter(|dtype| matches!(dtype, Dtype::F16 | Dtype::BF16))
            .filter(|_| up == gate && down == gate)
            .unwrap_or(Dtype::F32)
    }

    /// Everything that is not a dense feed-forward. Of a GGUF file the norms alone: its attention has other names and another order of rows.
    pub(crate) fn kept(&self, layers: DenseLayers) -> Vec<Kept> {
        match self {
            Self::Safetensors { checkpoint, .. } => {
                let numbers = 0..layers.count;
                let replaced: BTreeSet<String> = numbers
                    .flat_map(|layer| PARTS.map(|part| self.name(layer, part)))
                    .collect();
                checkpoint
                    .tensors()
                    .filter(|(name, _)| !replaced.contains(*name))
                    .map(|(name, entry)| Kept {
                        name: name.to_owned(),
                        shape: entry.shape.clone(),
                        dtype: entry.dtype,
                    })
                    .collect()
            }
            Self::Gguf { .. } => (0..layers.count)
                .map(|layer| Kept {
                    name: written_norm(layer),
                    shape: vec![layers.hidden],
                    dtype: Dtype::F32,
                })
                .collect(),
        }
    }

    /// The same with what is in them.
    pub(crate) fn kept_tensors(&self, layers: DenseLayers) -> Result<Vec<OutputTensor<'_>>> {
        let kept = self.kept(layers).into_iter().enumerate();
        kept.map(|(number, Kept { name, shape, dtype })| match self {
            Self::Safetensors { checkpoint, .. } => OutputTensor::copied(checkpoint, &name),
            // One norm a layer.
            Self::Gguf { .. } => {
                let norm = self.norm(number)?;
                OutputTensor::floats(name, &shape, norm.to_f32().into(), dtype)
            }
        })
        .collect()
    }

    /// The keys of the model's `config.json`, or what a GGUF file says of the same.
    ///
    /// # Errors
    /// [`Error::Format`] if the activation is not SiLU.
    pub(crate) fn config(&self) -> Result<Map<String, Value>> {
        let path = self.config_path();
        match self {
            Self::Safetensors { .. } => {
                let keys: Map<String, Value> = file::read_json(&path)?;
                for key in ACTIVATION_KEYS {
                    match keys.get(key).and_then(Value::as_str) {
                        None | Some("silu" | "swish") => {}
                        Some(other) => {
                            return Err(Error::Format {
                                path,
                                reason: format!("`{key}` = \"{other}\": silu is split"),
                            });
                        }
                    }
                }
                Ok(keys)
            }
            Self::Gguf { file, .. } => {
                let family = file
                    .value("general.architecture")
                    .and_then(GgufValue::as_text)
                    .unwrap_or("llama");
                if !GATED_BY_SILU.contains(&family) {
                    return Err(Error::Format {
                        path,
                        reason: format!(
                            "`general.architecture` = \"{family}\": {} are split, whose feed-forwards are gated by silu",
                            GATED_BY_SILU.join(", ")
                        ),
                    });
                }
                let mut keys = Map::new();
                for (key, gguf) in [
                    ("hidden_size", "embedding_length"),
                    ("intermediate_size", "feed_forward_length"),
                    ("num_hidden_layers", "block_count"),
                    ("num_attention_heads", "attention.head_count"),
                    ("num_key_value_heads", "attention.head_count_kv"),
                    ("max_position_embeddings", "context_length"),
                ] {
                    let value = file.value(&format!("{family}.{gguf}"));
                    if let Some(number) = value.and_then(GgufValue::as_u64) {
                        keys.insert(key.to_owned(), json!(number));
                    }
                }
                keys.insert("hidden_act".to_owned(), json!("silu"));
                Ok(keys)
            }
        }
    }

    /// Copies what a model's folder holds beside its weights, the tokenizer's files and the like. Returns what is not copied, as `source::copy_others` does.
    pub(crate) fn copy_others(&self, to: &Path) -> Result<Vec<String>> {
        match self {
            Self::Safetensors { folder, checkpoint } => {
                copy_others(folder, to, checkpoint, &["config.json", REPORT])
            }
            Self::Gguf { .. } => Ok(Vec::new()),
        }
    }

    /// What tells this source from another: see [`identity`]. The file of activations is one of its own.
    pub(crate) fn identity(&self, activations: Option<&Path>) -> Result<Value> {
        let mut source = match self {
            Self::Safetensors { checkpoint, .. } => identity(checkpoint, &[self.config_path()])?,
            Self::Gguf { path, file } => {
                let mut headers = crc32fast::Hasher::new();
                for (name, tensor) in file.tensors() {
                    headers.update(format!("{name} {} {:?}\n", tensor.ty, tensor.shape).as_bytes());
                }
                let folder = file::folder_of(path);
                let root = folder.canonicalize().map_err(file::failed(folder))?;
                json!({
                    "path": root.to_string_lossy(),
                    "files": [facts(&root, path)?],
                    "headers_crc32": headers.finalize(),
                })
            }
        };
        if let Some(path) = activations {
            source["activations"] = identity_at(path, &Checkpoint::open(path)?, &[])?;
        }
        Ok(source)
    }
}

/// The name that the norm before a feed-forward is written under.
fn written_norm(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}
