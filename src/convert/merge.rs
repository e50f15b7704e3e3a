//! A LoRA adapter merged into the model underneath, and taken out again.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::convert::plan::grouped;
use crate::convert::source::{copy_others, identity};
use crate::convert::stage::{Fingerprint, REPORT, Replacement, Stage};
use crate::convert::{Listener, Progress};
use crate::error::{Error, Result};
use crate::file;
use crate::formats::{
    ADAPTER_CONFIG, Checkpoint, ExpertOrientation, FusedExperts, LoraPair, ModelWriter,
    OutputTensor, PEFT_PREFIX, PeftAdapter, Target, write_json,
};
use crate::tensor::Tensor;

/// The configuration of a model.
const CONFIG: &str = "config.json";

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
    /// What of the model's folder was not copied: other files of weights, which are those without the adapter; links to folders, and what else is no file.
    pub not_copied: Vec<String>,
}

/// What an adapter does to one tensor of the model: it is replaced, then something is added.
#[derive(Default)]
struct Change<'a> {
    whole: Option<&'a Tensor>,
    added: Option<Added<'a>>,
}

/// What is added to a tensor.
enum Added<'a> {
    /// To a weight, or to a table of embeddings.
    Pair(&'a LoraPair),
    /// To the weights of experts in one tensor, which is taken apart when it is its turn.
    Experts(&'a LoraPair, ExpertOrientation),
    /// The bias of B, times the scale, to that of the layer.
    Bias { bias: &'a Tensor, scale: f64 },
}

impl Change<'_> {
    /// The tensor as it is afterwards.
    fn of(&self, before: &Tensor, fan_in_fan_out: bool, unmerge: bool) -> Result<Tensor> {
        let tensor = self.whole.unwrap_or(before);
        match &self.added {
            None => Ok(tensor.clone()),
            Some(Added::Pair(pair)) if unmerge => pair.unmerge(tensor, fan_in_fan_out),
            Some(Added::Pair(pair)) => pair.merge(tensor, fan_in_fan_out),
            Some(Added::Experts(pair, orientation)) => {
                let extents = <[usize; 3]>::try_from(tensor.shape().dims());
                let extents =
                    extents.map_err(|_| Error::shape("merge", "experts have 3 extents"))?;
                let experts = FusedExperts::of_oriented_pair(pair, extents, *orientation)?;
                if unmerge {
                    experts.unmerge(tensor)
                } else {
                    experts.merge(tensor)
                }
            }
            Some(Added::Bias { bias, scale }) => {
                let factor = if unmerge { -scale } else { *scale } as f32;
                let pairs = tensor.to_f32().into_iter().zip(bias.to_f32());
                Tensor::f32(tensor.shape(), pairs.map(|(w, b)| w + factor * b).collect())
            }
        }
    }
}

/// The changes of an adapter by the names of the model's tensors.
struct Changes<'a> {
    model: &'a Checkpoint,
    by_name: BTreeMap<String, Change<'a>>,
}

/// A pair for fused experts, and the tensor that it is for.
struct Fused<'a> {
    /// What stands before the tensor's name, a dot behind it.
    module: String,
    name: String,
    extents: [usize; 3],
    pair: &'a LoraPair,
}

impl Fused<'_> {
    /// Whether the widths do not say which of them A reads.
    fn is_square(&self) -> bool {
        self.extents[1] == self.extents[2]
    }
}

/// What PEFT puts into the names of modules that it adapts, or trains whole, as often as it does.
const WRAPPERS: [&str; 2] = ["base_layer", "modules_to_save"];

/// The name that a tensor of an adapter has in the model.
fn name_in_model(key: &str) -> String {
    let name = key.strip_prefix(PEFT_PREFIX).unwrap_or(key);
    let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
    parts.collect::<Vec<_>>().join(".")
}

impl<'a> Changes<'a> {
    fn of(model: &'a Checkpoint, adapter: &'a PeftAdapter, unmerge: bool) -> Result<Self> {
        let mut changes = Self {
            model,
            by_name: BTreeMap::new(),
        };
        for (key, tensor) in &adapter.others {
            // What a module that was trained whole was before: with `bias` of all, its bias is saved too.
            if key.contains(".original_module.") {
                continue;
            }
            let name = name_in_model(key);
            let adapted = name.strip_suffix(".weight");
            // PEFT saves the weight under an adapted embedding or output layer with it.
            let is_underneath = key.contains(".base_layer.")
                && adapted.is_some_and(|path| adapter.pairs.contains_key(path));
            if unmerge && is_underneath {
                continue;
            }
            if unmerge {
                return Err(Error::Setting {
                    setting: "unmerge",
                    value: key.clone(),
                    reason: "it was trained whole: what was there before is not in the adapter"
                        .to_owned(),
                });
            }
            let change = changes.at(&name, Some(tensor.shape().dims()))?;
            if change.whole.is_some_and(|other| other != tensor) {
                let reason = format!("`{key}` is another tensor for it");
                return Err(Error::DuplicateName { name, reason });
            }
            change.whole = Some(tensor);
        }
        let mut fused = Vec::new();
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
                let rank = adapter.config.rank_of(path)?;
                if pair.rank() != rank {
                    let reason = format!(
                        "it has rank {}, and the configuration says {rank}",
                        pair.rank()
                    );
                    return Err(Error::setting("adapter", path, reason));
                }
                changes.add(&weight, Some(&shape), Added::Pair(pair))?;
            } else if adapter.config.has_fused_experts() {
                fused.push(changes.fused(path, pair, adapter.config.rank_of(path)?)?);
            } else {
                return Err(missing(&weight, path));
            }
            if let Some(bias) = &pair.bias {
                let shape = Some(bias.shape().dims());
                let scale = pair.scale;
                changes.add(&format!("{path}.bias"), shape, Added::Bias { bias, scale })?;
            }
        }
        changes.add_fused(fused)?;
        Ok(changes)
    }

    /// The change of a tensor that must be there, and of this shape.
    fn at(&mut self, name: &str, shape: Option<&[usize]>) -> Result<&mut Change<'a>> {
        let Some(entry) = self.model.entry(name) else {
            return Err(missing(name, name));
        };
        let floats = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
        if !floats.contains(&entry.dtype) {
            let reason = format!(
                "an adapter changes it, and its elements are of type {:?}: F64, F32, F16 and BF16 are merged",
                entry.dtype
            );
            return Err(self.model.wrong(name, &reason));
        }
        if let Some(shape) = shape.filter(|shape| *shape != entry.shape) {
            let reason = format!("it is {:?}, and the adapter's is {shape:?}", entry.shape);
            return Err(self.model.wrong(name, &reason));
        }
        Ok(self.by_name.entry(name.to_owned()).or_default())
    }

    fn add(&mut self, name: &str, shape: Option<&[usize]>, added: Added<'a>) -> Result<()> {
        let change = self.at(name, shape)?;
        if change.added.replace(added).is_some() {
            return Err(Error::DuplicateName {
                name: name.to_owned(),
                reason: "the adapter changes it twice".to_owned(),
            });
        }
        Ok(())
    }

    /// Finds the tensor of experts that a pair is for. PEFT names a pair by the module, and where two tensors of one module are adapted, the inner pair
    /// with `base_layer` behind it; the widths say which is which. A pair holds `rank` of each expert.
    fn fused(&self, path: &str, pair: &'a LoraPair, rank: usize) -> Result<Fused<'a>> {
        let module = format!("{}.", path.split(".base_layer").next().unwrap_or(path));
        let fitting = self.model.names_from(&module).filter_map(|name| {
            let entry = self.model.entry(name)?;
            let extents = <[usize; 3]>::try_from(entry.shape.as_slice()).ok()?;
            let is_own = !name[module.len()..].contains('.');
            let ranks = extents[0].checked_mul(rank);
            let fits = is_own
                && ranks == Some(pair.rank())
                && ExpertOrientation::of(pair, extents).is_some();
            fits.then_some((name, extents))
        });
        match fitting.collect::<Vec<_>>().as_slice() {
            [] => Err(missing(&format!("{module}*"), path)),
            [(name, extents)] => Ok(Fused {
                name: (*name).to_owned(),
                extents: *extents,
                pair,
                module,
            }),
            [(one, _), (other, _), ..] => Err(Error::Setting {
                setting: "adapter",
                value: path.to_owned(),
                reason: format!("its widths fit `{one}` and `{other}` of the model"),
            }),
        }
    }

    /// Where widths do not say which of them A reads, the other tensor of the module does: all tensors of a module lie alike.
    fn add_fused(&mut self, mut fused: Vec<Fused<'a>>) -> Result<()> {
        fused.sort_by_key(Fused::is_square);
        let mut known = BTreeMap::new();
        for of in fused {
            let found = if of.is_square() {
                known.get(&of.module).copied()
            } else {
                ExpertOrientation::of(of.pair, of.extents)
            };
            let Some(orientation) = found else {
                let reason = format!(
                    "it is {:?}: which of two equal widths the adapter's A reads depends on the model and on the release of PEFT, and the file does not say it",
                    of.extents
                );
                return Err(self.model.wrong(&of.name, &reason));
            };
            known.insert(of.module, orientation);
            self.add(&of.name, None, Added::Experts(of.pair, orientation))?;
        }
        Ok(())
    }
}

fn missing(name: &str, path: &str) -> Error {
    Error::Setting {
        setting: "adapter",
        value: path.to_owned(),
        reason: format!("it is for another model: this one has no tensor `{name}` that fits it"),
    }
}

/// What families call their tables of embeddings and their output layers.
const TABLES: [&str; 9] = [
    "embeddings",
    "embed_tokens",
    "wte",
    "shared",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "lm_head",
    "embed_out",
];

/// A change of the embeddings would change the output layer too if that has no weight of its own, and the other way round.
fn check_not_tied(
    model: &Checkpoint,
    adapter: &PeftAdapter,
    keys: &Map<String, Value>,
) -> Result<()> {
    // Models of several parts say it in the part of the text, whatever that is called; the outer key may be a default that nobody goes by.
    let parts = keys.values().filter_map(Value::as_object);
    let said: Vec<bool> = std::iter::once(keys)
        .chain(parts)
        .filter_map(|keys| keys.get("tie_word_embeddings")?.as_bool())
        .collect();
    let said = (!said.is_empty()).then(|| said.contains(&true));
    // Where nothing is said families differ: a language model without the weight of an output layer has none of its own.
    let is_tied = said.unwrap_or_else(|| {
        let kinds = keys.get("architectures").map(Value::to_string);
        let kinds = kinds.unwrap_or_default();
        let writes = ["LMHead", "ForCausalLM", "ForConditionalGeneration"];
        writes.iter().any(|kind| kinds.contains(kind))
            && !model
                .tensors()
                .any(|(name, _)| name.ends_with("lm_head.weight"))
    });
    let others = adapter.others.keys().map(|key| name_in_model(key));
    let others = others.filter_map(|name| Some(name.strip_suffix(".weight")?.to_owned()));
    let mut paths = adapter.pairs.keys().cloned().chain(others);
    let table = paths.find(|path| {
        let name = path.rsplit('.').next().unwrap_or(path);
        let pair = adapter.pairs.get(path);
        TABLES.contains(&name) || pair.is_some_and(|pair| pair.target == Target::Embedding)
    });
    match table {
        Some(path) if is_tied => Err(Error::Setting {
            setting: "adapter",
            value: path,
            reason: "the model's embeddings and its output layer are one tensor (`tie_word_embeddings`, or no `lm_head.weight`): merged, the adapter of one would change both".to_owned(),
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
/// their types, but that F64 becomes F32. Each adapted weight becomes W + scale B A (with `fan_in_fan_out` its transpose), biases of B are added to the layer's, and
/// tensors that were trained whole replace the model's. Sums are in 32 bits. With [`MergeOptions::dtype`] F32, the `dtype` of config.json says so too, so that
/// programs do not round again what they load.
///
/// The folder is made as `out.partial` and renamed when it is whole; interrupted, it is made anew. In memory are the adapter in 32 bits, the changed tensors of one file,
/// of 512 MiB or one tensor, and 8 bytes for each element of the one that is being changed. `listener` is told how many of how many files are written.
///
/// # Errors
/// [`Error::Setting`] if the adapter is for another model, changes embeddings that the output layer is tied to, or was trained whole in part and is to be taken out;
/// [`Error::Format`], with the tensor's name, if a tensor has other extents, is of no floats or holds a NaN, if its experts' widths are equal and nothing says which of them A reads,
/// or if the model was changed meanwhile; [`Error::Limit`] if a sum is beyond what its type holds; [`Error::File`] if a file cannot be read or the output may not be written.
pub fn merge_lora(
    model: &Path,
    adapter: &Path,
    out: &Path,
    options: &MergeOptions,
    listener: Listener<'_>,
) -> Result<MergeReport> {
    let config = model.join(CONFIG);
    let mut keys: Map<String, Value> = file::read_json(&config)?;
    let checkpoint = Checkpoint::open(model)?;
    let lora = PeftAdapter::read(adapter)?;
    check_not_tied(&checkpoint, &lora, &keys)?;
    let changes = Changes::of(&checkpoint, &lora, options.unmerge)?;
    let of_model = |checkpoint: &Checkpoint| identity(checkpoint, std::slice::from_ref(&config));
    let fingerprint = Fingerprint {
        options: json!({
            "unmerge": options.unmerge, "dtype": options.dtype.map(|dtype| format!("{dtype:?}")),
        }),
        source: json!({
            "model": of_model(&checkpoint)?,
            "adapter": identity(&Checkpoint::open(adapter)?, &[adapter.join(ADAPTER_CONFIG)])?,
        }),
    };
    let replacement = Replacement {
        overwrite: options.overwrite,
        restart: options.restart,
    };
    let mut stage = Stage::open(out, &[model, adapter], &fingerprint, replacement)?;
    stage.empty()?;
    if let Some(notice) = &stage.notice {
        listener(Progress::Notice(notice));
    }
    let writer = ModelWriter::new(stage.folder());
    let groups = grouped(&checkpoint, |_| true);
    let of = groups.len();
    let mut files = Vec::new();
    let mut merged = Vec::new();
    for (number, names) in groups.iter().enumerate() {
        let finished = number;
        listener(Progress::Written { finished, of });
        let file = ModelWriter::shard_name(number + 1, of);
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
    // An adapter may lie in the model's folder: its configuration would make an adapter of the result.
    let mut written = vec![REPORT, ADAPTER_CONFIG];
    if options.dtype == Some(Dtype::F32) {
        say_single(&mut keys);
        write_json(&stage.folder().join(CONFIG), &Value::Object(keys))?;
        written.push(CONFIG);
    }
    let report = MergeReport {
        tensors: merged,
        not_copied: copy_others(model, stage.folder(), &checkpoint, &written)?,
    };
    // What was read is what was there at the beginning, or the parts do not fit each other.
    if of_model(&Checkpoint::open(model)?)? != fingerprint.source["model"] {
        let reason = "its files were changed while the adapter was merged";
        return Err(file::damaged(model)(reason.to_owned()));
    }
    stage.publish_with("merge_lora", &fingerprint, &report)?;
    listener(Progress::Written { finished: of, of });
    Ok(report)
}

/// Where a configuration says what to load the model in, that is 32 bits now.
fn say_single(keys: &mut Map<String, Value>) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = keys.get_mut(key).filter(|dtype| dtype.is_string()) {
            *dtype = "float32".into();
        }
    }
    if let Some(Value::Object(of_text)) = keys.get_mut("text_config") {
        say_single(of_text);
    }
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
    let shape = after.shape().dims().to_vec();
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
    let (old, new) = (before.into_f32(), after.into_f32());
    let pairs = new.iter().zip(&old);
    let difference = norm(pairs.map(|(new, old)| f64::from(*new) - f64::from(*old)));
    let lost = norm(new.iter().map(|&x| f64::from(rounded(x)) - f64::from(x)));
    let facts = MergedTensor {
        name: name.to_owned(),
        change: ratio(difference, norm(old.iter().map(|&x| f64::from(x)))),
        rounding: ratio(lost, difference),
    };
    drop(old);
    let tensor = OutputTensor::floats(name.to_owned(), &shape, new.into(), dtype)?;
    Ok((tensor, facts))
}
