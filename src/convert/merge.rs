//! A LoRA adapter merged into the model underneath, and taken out again.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::convert::plan::grouped;
use crate::convert::source::{copy_others, identity};
use crate::convert::stage::{Fingerprint, REPORT, Replacement, Stage};
use crate::error::{Error, Result};
use crate::formats::{
    Checkpoint, FusedExperts, LoraPair, ModelWriter, OutputTensor, PeftAdapter, Target,
};
use crate::tensor::Tensor;

/// How an adapter is merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeOptions {
    /// Subtract what merging adds.
    pub unmerge: bool,
    /// F32, F16 or BF16 for the tensors that change; `None` for what each has.
    pub dtype: Option<Dtype>,
    /// Replace an output that is there.
    pub overwrite: bool,
    /// Throw away what another conversion has left unfinished.
    pub restart: bool,
}

/// What became of a tensor that an adapter changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedTensor {
    /// Its name.
    pub name: String,
    /// The norm of the change by the norm of what was there; 1 for a tensor that is replaced whole and was zero.
    pub change: f64,
    /// The norm of what is lost by rounding to the type that is written, by the norm of the change: near 1 the adapter is rounded away.
    pub rounding: f64,
}

/// What [`merge_lora`] has done; in `conversion.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// The tensors that changed, in the order of their names.
    pub tensors: Vec<MergedTensor>,
    /// Files of the model's folder that were not copied, because they hold its weights in another form.
    pub not_copied: Vec<String>,
}

/// What an adapter does to one tensor of the model.
enum Change<'a> {
    /// A weight, or with an embedding's pair a table.
    Pair(&'a LoraPair),
    /// Weights of experts in one tensor.
    Experts(FusedExperts),
    /// The bias of B goes to the layer's, times the scale.
    Bias { bias: &'a Tensor, scale: f64 },
    /// Trained whole.
    Whole(&'a Tensor),
}

impl Change<'_> {
    /// The tensor as it is afterwards.
    fn of(&self, tensor: &Tensor, fan_in_fan_out: bool, unmerge: bool) -> Result<Tensor> {
        match self {
            Self::Pair(pair) if unmerge => pair.unmerge(tensor, fan_in_fan_out),
            Self::Pair(pair) => pair.merge(tensor, fan_in_fan_out),
            Self::Experts(experts) if unmerge => experts.unmerge(tensor),
            Self::Experts(experts) => experts.merge(tensor),
            Self::Bias { bias, scale } => {
                let factor = if unmerge { -scale } else { *scale } as f32;
                let pairs = tensor.to_f32().into_iter().zip(bias.to_f32());
                Tensor::f32(tensor.shape(), pairs.map(|(w, b)| w + factor * b).collect())
            }
            Self::Whole(whole) => Ok((*whole).clone()),
        }
    }
}

/// The changes of an adapter by the names of the model's tensors.
struct Changes<'a> {
    model: &'a Checkpoint,
    by_name: BTreeMap<String, Change<'a>>,
}

impl<'a> Changes<'a> {
    fn of(model: &'a Checkpoint, adapter: &'a PeftAdapter, unmerge: bool) -> Result<Self> {
        let mut changes = Self {
            model,
            by_name: BTreeMap::new(),
        };
        for (path, pair) in &adapter.pairs {
            let weight = format!("{path}.weight");
            if model.entry(&weight).is_some() {
                let [d_in, d_out] = [pair.a.shape().last(), pair.b.shape().dims()[0]];
                let transposed = adapter.config.fan_in_fan_out || pair.target == Target::Embedding;
                let shape = if transposed {
                    [d_in, d_out]
                } else {
                    [d_out, d_in]
                };
                changes.put(weight, Change::Pair(pair), Some(&shape))?;
            } else if adapter.config.has_fused_experts() {
                changes.fused(path, pair)?;
            } else {
                return Err(missing(&weight, path));
            }
            if let Some(bias) = &pair.bias {
                let (name, scale) = (format!("{path}.bias"), pair.scale);
                let shape = Some(bias.shape().dims());
                changes.put(name, Change::Bias { bias, scale }, shape)?;
            }
        }
        for (key, tensor) in &adapter.others {
            if unmerge {
                return Err(Error::Setting {
                    setting: "unmerge",
                    value: key.clone(),
                    reason: "it was trained whole: what was there before is not in the adapter"
                        .to_owned(),
                });
            }
            let name = key.strip_prefix("base_model.model.").unwrap_or(key);
            let shape = Some(tensor.shape().dims());
            changes.put(name.to_owned(), Change::Whole(tensor), shape)?;
        }
        Ok(changes)
    }

    fn put(&mut self, name: String, change: Change<'a>, shape: Option<&[usize]>) -> Result<()> {
        let Some(entry) = self.model.entry(&name) else {
            return Err(missing(&name, &name));
        };
        let floats = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
        if !floats.contains(&entry.dtype) {
            let reason = format!(
                "an adapter changes it, and its elements are of type {:?}: F64, F32, F16 and BF16 are merged",
                entry.dtype
            );
            return Err(self.model.wrong(&name, &reason));
        }
        if let Some(shape) = shape.filter(|shape| *shape != entry.shape) {
            let reason = format!("it is {:?}, and the adapter's is {shape:?}", entry.shape);
            return Err(self.model.wrong(&name, &reason));
        }
        if self.by_name.insert(name.clone(), change).is_some() {
            return Err(Error::DuplicateName {
                name,
                reason: "the adapter changes it twice".to_owned(),
            });
        }
        Ok(())
    }

    /// Finds the tensor of experts that a pair is for. PEFT names a pair by the module, and where two tensors of one module are adapted, the inner pair
    /// with `base_layer` behind it; the widths say which is which.
    fn fused(&mut self, path: &str, pair: &'a LoraPair) -> Result<()> {
        let module = path.split(".base_layer").next().unwrap_or(path);
        let beginning = format!("{module}.");
        let names = self.model.names_from(&beginning);
        let fitting = names.filter_map(|name| {
            let entry = self.model.entry(name)?;
            let extents = <[usize; 3]>::try_from(entry.shape.as_slice()).ok()?;
            let experts = FusedExperts::of_pair(pair, extents).ok()?;
            (!name[beginning.len()..].contains('.')).then_some((name, experts))
        });
        let mut fitting = fitting.collect::<Vec<_>>();
        if fitting.len() > 1 {
            return Err(Error::Setting {
                setting: "adapter",
                value: path.to_owned(),
                reason: format!(
                    "its widths fit `{}` and `{}` of the model",
                    fitting[0].0, fitting[1].0
                ),
            });
        }
        let Some((name, experts)) = fitting.pop() else {
            return Err(missing(&format!("{beginning}*"), path));
        };
        self.put(name.to_owned(), Change::Experts(experts), None)
    }
}

fn missing(name: &str, path: &str) -> Error {
    Error::Setting {
        setting: "adapter",
        value: path.to_owned(),
        reason: format!("it is for another model: this one has no tensor `{name}` that fits it"),
    }
}

/// A change of the embeddings would change the output layer too if that has no weight of its own.
fn check_not_tied(changes: &Changes<'_>, keys: &Value) -> Result<()> {
    let said = keys.get("tie_word_embeddings").and_then(Value::as_bool);
    // Where nothing is said families differ: a language model without the weight of an output layer has none of its own.
    let tied = said.unwrap_or_else(|| {
        let kinds = keys.get("architectures").map(Value::to_string);
        kinds.is_some_and(|kinds| kinds.contains("ForCausalLM"))
            && changes.model.entry("lm_head.weight").is_none()
    });
    let table = changes.by_name.iter().find_map(|(name, change)| {
        let is_table = matches!(change, Change::Pair(pair) if pair.target == Target::Embedding)
            || name.ends_with("embed_tokens.weight");
        is_table.then_some(name)
    });
    match table {
        Some(name) if tied => Err(Error::Setting {
            setting: "adapter",
            value: name.clone(),
            reason: "the model's output layer is tied to it (`tie_word_embeddings`, or no `lm_head.weight`): merged, the adapter would change both".to_owned(),
        }),
        _ => Ok(()),
    }
}

fn norm(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|x| x * x).sum::<f64>().sqrt()
}

fn ratio(part: f64, whole: f64) -> f64 {
    match (part, whole) {
        (0.0, _) => 0.0,
        (_, 0.0) => 1.0,
        _ => part / whole,
    }
}

/// Merges an adapter into a model of the folder `model` and writes the result as the folder `out`: everything else of the model is unchanged, tensors keep
/// their types. Without `unmerge` each adapted weight becomes W + scale B A (with `fan_in_fan_out` its transpose), biases of B are added to the layer's, and
/// tensors that were trained whole replace the model's. Sums are in 32 bits.
///
/// The folder is made as `out.partial` and renamed when it is whole. Of the model no more is in memory than the tensors of one file that
/// change, of 512 MiB or one tensor. `progress` is told how many of how many files are written.
///
/// # Errors
/// [`Error::Setting`] if the adapter is for another model, changes embeddings that the output layer is tied to, or was trained whole in part and is to be taken out;
/// [`Error::Format`], with the tensor's name, if a tensor has other extents, is of no floats or holds a NaN;
/// [`Error::Limit`] if a sum is beyond what its type holds; [`Error::File`] if a file cannot be read or the output may not be written.
pub fn merge_lora(
    model: &Path,
    adapter: &Path,
    out: &Path,
    options: &MergeOptions,
    progress: &dyn Fn(usize, usize),
) -> Result<MergeReport> {
    let config = model.join("config.json");
    let keys: Value = crate::file::read_json(&config)?;
    let checkpoint = Checkpoint::open(model)?;
    let lora = PeftAdapter::read(adapter)?;
    let changes = Changes::of(&checkpoint, &lora, options.unmerge)?;
    check_not_tied(&changes, &keys)?;
    let fingerprint = Fingerprint {
        options: json!({
            "unmerge": options.unmerge, "dtype": options.dtype.map(|dtype| format!("{dtype:?}")),
        }),
        source: json!({
            "model": identity(&checkpoint, &[config])?,
            "adapter": identity(&Checkpoint::open(adapter)?, &[adapter.join("adapter_config.json")])?,
        }),
    };
    let replacement = Replacement {
        overwrite: options.overwrite,
        restart: options.restart,
    };
    let stage = Stage::open(out, &[model, adapter], &fingerprint, replacement)?;
    let writer = ModelWriter::new(stage.folder());
    let groups = grouped(&checkpoint, |_| true);
    let mut files = Vec::new();
    let mut merged = Vec::new();
    for (number, names) in groups.iter().enumerate() {
        progress(number, groups.len());
        let file = ModelWriter::shard_name(number + 1, groups.len());
        let tensors = names
            .iter()
            .map(|name| match changes.by_name.get(name) {
                None => OutputTensor::copied(&checkpoint, name),
                Some(change) => {
                    let (tensor, facts) = changed(&checkpoint, name, change, &lora, options)?;
                    merged.push(facts);
                    Ok(tensor)
                }
            })
            .collect::<Result<_>>()?;
        writer.write_shard(&file, tensors, BTreeMap::new())?;
        files.push(file);
    }
    writer.write_index(&files)?;
    let report = MergeReport {
        tensors: merged,
        not_copied: copy_others(model, stage.folder(), &checkpoint, &[REPORT])?,
    };
    stage.publish_with("merge_lora", &fingerprint, &report)?;
    progress(groups.len(), groups.len());
    Ok(report)
}

/// A tensor with its change, and what that was.
fn changed(
    checkpoint: &Checkpoint,
    name: &str,
    change: &Change<'_>,
    lora: &PeftAdapter,
    options: &MergeOptions,
) -> Result<(OutputTensor<'static>, MergedTensor)> {
    let before = checkpoint.finite_tensor(name)?;
    let after = change.of(&before, lora.config.fan_in_fan_out, options.unmerge)?;
    let kept = match checkpoint.entry(name).map(|entry| entry.dtype) {
        Some(dtype @ (Dtype::F16 | Dtype::BF16)) => dtype,
        _ => Dtype::F32,
    };
    let dtype = options.dtype.unwrap_or(kept);
    let rounded = |x: f32| match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let (old, new) = (before.to_f32(), after.to_f32());
    let pairs = || new.iter().zip(&old);
    let difference = norm(pairs().map(|(new, old)| f64::from(*new) - f64::from(*old)));
    let lost = norm(new.iter().map(|&x| f64::from(rounded(x)) - f64::from(x)));
    let facts = MergedTensor {
        name: name.to_owned(),
        change: ratio(difference, norm(old.iter().map(|&x| f64::from(x)))),
        rounding: ratio(lost, difference),
    };
    let shape = after.shape().dims().to_vec();
    let tensor = OutputTensor::floats(name.to_owned(), &shape, new.into(), dtype)?;
    Ok((tensor, facts))
}
