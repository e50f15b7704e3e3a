//! Where dense feed-forwards come from: a Llama-like model in safetensors, or a GGUF file of the Llama family.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::convert::DenseFeedForward;
use crate::convert::source::copy_others;
use crate::convert::stage::REPORT;
use crate::error::{Error, Result};
use crate::file;
use crate::formats::{Checkpoint, Dtype, GgufFile, GgufValue, OutputTensor};
use crate::tensor::{Tensor, TensorType};

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

const PARTS: [&str; 3] = ["gate", "up", "down"];
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

    fn name(&self, layer: usize, part: &str) -> String {
        match self {
            Self::Safetensors { .. } => format!("model.layers.{layer}.mlp.{part}_proj.weight"),
            Self::Gguf { .. } => format!("blk.{layer}.ffn_{part}.weight"),
        }
    }

    fn norm_name(&self, layer: usize) -> String {
        match self {
            Self::Safetensors { .. } => {
                format!("model.layers.{layer}.post_attention_layernorm.weight")
            }
            Self::Gguf { .. } => format!("blk.{layer}.ffn_norm.weight"),
        }
    }

    /// The numbers of the layers that have a dense feed-forward.
    pub(crate) fn layers(&self) -> Result<Vec<usize>> {
        let number = |name: &str| -> Option<usize> {
            let rest = name.strip_prefix(match self {
                Self::Safetensors { .. } => "model.layers.",
                Self::Gguf { .. } => "blk.",
            })?;
            let layer = rest.split('.').next()?.parse().ok()?;
            (name == self.name(layer, "gate")).then_some(layer)
        };
        let mut layers: Vec<usize> = match self {
            Self::Safetensors { checkpoint, .. } => checkpoint
                .tensors()
                .filter_map(|(name, _)| number(name))
                .collect(),
            Self::Gguf { file, .. } => file
                .tensors()
                .iter()
                .filter_map(|(name, _)| number(name))
                .collect(),
        };
        layers.sort_unstable();
        if layers.is_empty() {
            return Err(self.wrong(format!(
                "there is no dense feed-forward: no tensor `{}`",
                self.name(0, "gate")
            )));
        }
        Ok(layers)
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Format {
            path: self.path().to_owned(),
            reason,
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self {
            Self::Safetensors { checkpoint, .. } => checkpoint.tensor(name),
            Self::Gguf { file, .. } => file.tensor(name),
        }
    }

    pub(crate) fn feed_forward(&self, layer: usize) -> Result<DenseFeedForward> {
        if let Self::Safetensors { checkpoint, .. } = self {
            for part in PARTS {
                let bias = format!("model.layers.{layer}.mlp.{part}_proj.bias");
                if checkpoint.entry(&bias).is_some() {
                    return Err(self.wrong(format!("`{bias}`: experts have no biases")));
                }
            }
        }
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

    /// What the experts' matrices are written in.
    pub(crate) fn dtype(&self, layer: usize) -> Dtype {
        match self {
            Self::Safetensors { checkpoint, .. } => checkpoint
                .entry(&self.name(layer, "gate"))
                .map(|entry| entry.dtype)
                .filter(|dtype| matches!(dtype, Dtype::F16 | Dtype::BF16))
                .unwrap_or(Dtype::F32),
            Self::Gguf { .. } => Dtype::F32,
        }
    }

    /// Everything that is not a dense feed-forward of these layers. Of a GGUF file the norms alone: its attention has other names and another order of rows.
    pub(crate) fn others(&self, layers: &[usize]) -> Result<Vec<OutputTensor<'_>>> {
        match self {
            Self::Safetensors { checkpoint, .. } => {
                let replaced: std::collections::BTreeSet<String> = layers
                    .iter()
                    .flat_map(|&layer| PARTS.map(|part| self.name(layer, part)))
                    .collect();
                checkpoint
                    .tensors()
                    .filter(|(name, _)| !replaced.contains(*name))
                    .map(|(name, _)| OutputTensor::copied(checkpoint, name))
                    .collect()
            }
            Self::Gguf { .. } => layers
                .iter()
                .map(|&layer| {
                    let norm = self.norm(layer)?;
                    let TensorType { shape, .. } = norm.ty();
                    OutputTensor::floats(
                        format!("model.layers.{layer}.post_attention_layernorm.weight"),
                        shape.dims(),
                        norm.to_f32().into(),
                        Dtype::F32,
                    )
                })
                .collect(),
        }
    }

    /// The keys of the model's `config.json`, or what a GGUF file says of the same.
    ///
    /// # Errors
    /// [`Error::Format`] if the activation is not SiLU.
    pub(crate) fn config(&self) -> Result<Map<String, Value>> {
        match self {
            Self::Safetensors { folder, .. } => {
                let path = folder.join("config.json");
                let keys: Map<String, Value> = file::read_json(&path)?;
                match keys.get("hidden_act").and_then(Value::as_str) {
                    None | Some("silu" | "swish") => Ok(keys),
                    Some(other) => Err(Error::Format {
                        path,
                        reason: format!("`hidden_act` = \"{other}\": silu is split"),
                    }),
                }
            }
            Self::Gguf { file, .. } => {
                let family = file
                    .value("general.architecture")
                    .and_then(GgufValue::as_text)
                    .unwrap_or("llama");
                if !GATED_BY_SILU.contains(&family) {
                    return Err(Error::Format {
                        path: self.path().to_owned(),
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

    /// Copies what a model's folder holds beside its weights, the tokenizer's files and the like. Returns the weights in other formats, which are not copied.
    pub(crate) fn copy_others(&self, to: &Path) -> Result<Vec<String>> {
        match self {
            Self::Safetensors { folder, checkpoint } => {
                copy_others(folder, to, checkpoint, &["config.json", REPORT])
            }
            Self::Gguf { .. } => Ok(Vec::new()),
        }
    }

    /// What tells this source from another.
    pub(crate) fn identity(&self) -> Result<Value> {
        let path = self.path();
        let canonical = path.canonicalize().map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(json!({ "path": canonical }))
    }
}
