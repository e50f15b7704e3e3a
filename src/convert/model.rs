//! A whole model's mixtures into latent experts, layer by layer: never more of it in memory than the layers at work.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::convert::model_report::{ModelReport, RunFacts, peak_memory_bytes};
use crate::convert::plan::{
    ARITHMETIC_VERSION, Content, LatentWidths, LayerRecord, RECORD, Shard, dtype_of, is_written,
    record_of, shards,
};
use crate::convert::source::{copy_others, identity, identity_at};
use crate::convert::stage::{Fingerprint, REPORT, Replacement, Stage, json_of};
use crate::convert::{Calibration, LatentOptions, LayerReport, convert_layer};
use crate::error::{Error, Result};
use crate::formats::{
    Checkpoint, LATENT_KEY, LATENT_LAYOUT_VERSION, LatentConfig, ModelWriter, MoeLayer, MoeModel,
    OutputTensor, write_json,
};

/// How a model is converted.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// How each layer is.
    pub latent: LatentOptions,
    /// A safetensors file with the inputs of each layer, `PATH.input` `[tokens, n]`, for layers of the paths `PATH`
    /// (`model.layers.0.mlp`): what matters is then the error on such inputs.
    pub calibration: Option<PathBuf>,
    /// F32, F16 or BF16; `None` for what the layer had.
    pub dtype: Option<Dtype>,
    /// Layers at work at once, each of which takes its own memory. The result does not depend on it.
    pub jobs: usize,
    /// Replace an output that is there.
    pub overwrite: bool,
    /// Throw away what a conversion with other options or of another source has left unfinished.
    pub restart: bool,
}

impl ModelOptions {
    /// These for each layer, one at a time, in the source's type, nothing replaced.
    #[must_use]
    pub fn new(latent: LatentOptions) -> Self {
        Self {
            latent,
            calibration: None,
            dtype: None,
            jobs: 1,
            overwrite: false,
            restart: false,
        }
    }

    fn widths(&self) -> LatentWidths {
        LatentWidths {
            groups: self.latent.groups,
            latent: self.latent.latent,
            factored_down: self.latent.factored_down,
        }
    }
}

/// What [`convert_model`] tells while it works.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// What is found of an earlier run, in words.
    Notice(&'a str),
    /// So many of all files are written, those of an earlier run among them.
    Written {
        /// Files that are whole.
        finished: usize,
        /// All files.
        of: usize,
    },
    /// A layer is converted.
    Layer {
        /// Its path.
        path: &'a str,
        /// What was lost.
        report: &'a LayerReport,
    },
}

/// Where progress is told.
pub type Listener<'a> = &'a (dyn Fn(Progress<'_>) + Sync);

/// Converts every mixture of experts of the model in the folder `source` into latent experts (see [`convert_layer`]) and writes a folder `out`
/// with the new model, everything else of it unchanged, and the report, `conversion.json`.
///
/// The folder is made as `out.partial` and renamed when it is whole. Run again after it was ended, with equal options, the conversion goes on with
/// the layers that are not written yet; the result is the same bit for bit, whatever the interruptions.
///
/// # Errors
/// As [`MoeModel::open`], before anything is written; [`Error::Setting`] if there is nothing to convert or an option does not fit a layer;
/// [`Error::Format`], with the tensor's name, for numbers that are not finite; [`Error::File`] if `out` is there and may not be replaced,
/// holds something else than a conversion, is being written by another process, or an unfinished conversion with other options or of another
/// source is in the way.
pub fn convert_model(
    source: &Path,
    out: &Path,
    options: &ModelOptions,
    listener: Listener<'_>,
) -> Result<ModelReport> {
    let model = MoeModel::open(source)?;
    let top_k = model.config().top_k()?;
    check(&model, options)?;
    let fingerprint = Fingerprint {
        options: described(options),
        source: identity_of(&model, options)?,
    };
    let replacement = Replacement {
        overwrite: options.overwrite,
        restart: options.restart,
    };
    let read: Vec<&Path> = [Some(source), options.calibration.as_deref()]
        .into_iter()
        .flatten()
        .collect();
    let stage = Stage::open(out, &read, &fingerprint, replacement)?;
    if let Some(notice) = &stage.notice {
        listener(Progress::Notice(notice));
    }
    let shards = shards(&model);
    let work = Work {
        model: &model,
        top_k,
        options,
        folder: stage.folder(),
        listener,
        of: shards.len(),
    };
    let written = work.all(&shards)?;
    let records = work.records(&shards)?;
    ModelWriter::new(stage.folder()).write_index(
        &shards
            .iter()
            .map(|shard| shard.file.clone())
            .collect::<Vec<_>>(),
    )?;
    write_config(&model, options, &records, stage.folder())?;
    let generated = ["config.json", REPORT];
    let not_copied = copy_others(source, stage.folder(), model.checkpoint(), &generated)?;
    // What was read is what was there at the beginning, or the parts do not fit each other.
    if identity_of(&MoeModel::open(source)?, options)? != fingerprint.source {
        return Err(Error::Format {
            path: source.to_owned(),
            reason: "its files were changed while they were converted".to_owned(),
        });
    }
    let run = RunFacts {
        files_written: written,
        files_of_earlier_runs: shards.len() - written,
        peak_memory_bytes: peak_memory_bytes(),
    };
    let report = ModelReport::new(records, not_copied, run);
    stage.publish_with("moe_to_latent", &fingerprint, &report)?;
    Ok(report)
}

/// The options that decide what is written, as JSON.
fn described(options: &ModelOptions) -> Value {
    let latent = &options.latent;
    json!({
        "groups": latent.groups,
        "latent": latent.latent,
        "rank": latent.rank,
        "factored_down": latent.factored_down,
        "group_by": format!("{:?}", latent.group_by),
        "svd": format!("{:?}", latent.svd),
        "calibration": options.calibration.is_some(),
        "dtype": options.dtype.map(|dtype| format!("{dtype:?}")),
        "layout_version": LATENT_LAYOUT_VERSION,
        "arithmetic": ARITHMETIC_VERSION,
        "rankmix": env!("CARGO_PKG_VERSION"),
    })
}

fn identity_of(model: &MoeModel, options: &ModelOptions) -> Result<Value> {
    let mut source = identity(model.checkpoint(), &[model.folder().join("config.json")])?;
    if let Some(path) = &options.calibration {
        source["calibration"] = identity_at(path, &Checkpoint::open(path)?, &[])?;
    }
    Ok(source)
}

/// The name of a layer's inputs in a calibration file.
fn input_name(layer: &MoeLayer) -> String {
    format!("{}.input", layer.path)
}

/// What can be known to be wrong before anything is written.
fn check(model: &MoeModel, options: &ModelOptions) -> Result<()> {
    let folder = || model.folder().display().to_string();
    if model.layers().is_empty() {
        return Err(Error::Setting {
            setting: "model",
            value: folder(),
            reason: "none of its layers is a mixture of experts of a layout that is read"
                .to_owned(),
        });
    }
    if options.jobs == 0 {
        return Err(Error::setting("jobs", 0, "must be at least 1"));
    }
    let written = [None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::BF16)];
    if !written.contains(&options.dtype) {
        return Err(Error::Setting {
            setting: "dtype",
            value: format!("{:?}", options.dtype),
            reason: "F32, F16 and BF16 are written".to_owned(),
        });
    }
    let calibration = options.calibration.as_ref().map(Checkpoint::open);
    let calibration = calibration.transpose()?;
    for layer in model.layers() {
        if layer.latent.is_some() {
            return Err(Error::Setting {
                setting: "model",
                value: folder(),
                reason: format!("the experts of `{}` are latent already", layer.path),
            });
        }
        options
            .latent
            .check([layer.experts, layer.intermediate, layer.hidden])?;
        let Some((file, path)) = calibration.as_ref().zip(options.calibration.as_ref()) else {
            continue;
        };
        let name = input_name(layer);
        let wrong = |reason: String| Error::Format {
            path: path.clone(),
            reason,
        };
        let Some(entry) = file.entry(&name) else {
            return Err(wrong(format!("tensor `{name}` is missing")));
        };
        if entry.shape.len() != 2 || entry.shape[1] != layer.hidden || entry.shape[0] == 0 {
            return Err(wrong(format!(
                "tensor `{name}` has the shape {:?}: [tokens, {}] is expected",
                entry.shape, layer.hidden
            )));
        }
    }
    Ok(())
}

/// `config.json` of the source, with what is new in it.
fn write_config(
    model: &MoeModel,
    options: &ModelOptions,
    records: &[LayerRecord],
    folder: &Path,
) -> Result<()> {
    let mut keys = model.config().keys().clone();
    let widths = options.widths();
    let latent = LatentConfig {
        format_version: LATENT_LAYOUT_VERSION,
        groups: widths.groups,
        latent: widths.latent,
        factored_down: widths.factored_down,
        expert_to_group: records
            .iter()
            .map(|record| (record.path.clone(), record.report.expert_to_group.clone()))
            .collect(),
    };
    keys.insert(LATENT_KEY.to_owned(), json_of("config.json", &latent)?);
    write_json(&folder.join("config.json"), &Value::Object(keys))
}

/// The files of one conversion.
struct Work<'a> {
    model: &'a MoeModel,
    top_k: usize,
    options: &'a ModelOptions,
    folder: &'a Path,
    listener: Listener<'a>,
    of: usize,
}

impl Work<'_> {
    /// Writes the files that are not there yet, `jobs` at once, and returns how many that were.
    fn all(&self, shards: &[Shard]) -> Result<usize> {
        let widths = self.options.widths();
        let is_missing = |shard: &&Shard| {
            !is_written(shard, self.folder, self.model, widths, self.options.dtype)
        };
        let missing: Vec<&Shard> = shards.iter().filter(is_missing).collect();
        let finished = AtomicUsize::new(shards.len() - missing.len());
        let tell = |finished| {
            (self.listener)(Progress::Written {
                finished,
                of: self.of,
            });
        };
        tell(finished.load(Ordering::Relaxed));
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let errors = Mutex::new(BTreeMap::new());
        // Threads of their own: what a layer computes in parallel is not to wait for another layer.
        std::thread::scope(|scope| {
            for _ in 0..self.options.jobs.min(missing.len()) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some(shard) = missing.get(number) else {
                            break;
                        };
                        match self.one(shard) {
                            Ok(()) => tell(finished.fetch_add(1, Ordering::Relaxed) + 1),
                            Err(error) => {
                                failed.store(true, Ordering::Relaxed);
                                let mut errors =
                                    errors.lock().unwrap_or_else(PoisonError::into_inner);
                                errors.insert(number, error);
                            }
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().unwrap_or_else(PoisonError::into_inner);
        match errors.into_values().next() {
            Some(error) => Err(error),
            None => Ok(missing.len()),
        }
    }

    fn one(&self, shard: &Shard) -> Result<()> {
        // Mapped anew each time, so that what was read is given back.
        match &shard.content {
            Content::Copied(names) => {
                let source = Checkpoint::open(self.model.folder())?;
                let tensors = names
                    .iter()
                    .map(|name| OutputTensor::copied(&source, name))
                    .collect::<Result<_>>()?;
                ModelWriter::new(self.folder).write_shard(&shard.file, tensors, BTreeMap::new())
            }
            Content::Layer(number) => self.layer(&shard.file, &self.model.layers()[*number]),
        }
    }

    fn layer(&self, file: &str, layer: &MoeLayer) -> Result<()> {
        let experts = {
            let source = MoeModel::open(self.model.folder())?;
            source.experts(source.layer(&layer.path)?)?
        };
        let calibration = self.calibration(layer)?;
        let (latent, report) = convert_layer(&experts, calibration.as_ref(), &self.options.latent)?;
        drop(experts);
        let record = LayerRecord {
            path: layer.path.clone(),
            report: report.with_top_k(self.top_k),
        };
        let dtype = dtype_of(layer, self.options.dtype);
        let tensors = latent
            .named(&layer.path)?
            .into_iter()
            .map(|matrix| OutputTensor::floats(matrix.name, &matrix.shape, matrix.elements, dtype))
            .collect::<Result<_>>()?;
        let metadata = BTreeMap::from([(RECORD.to_owned(), json_of(file, &record)?.to_string())]);
        ModelWriter::new(self.folder).write_shard(file, tensors, metadata)?;
        (self.listener)(Progress::Layer {
            path: &layer.path,
            report: &record.report,
        });
        Ok(())
    }

    fn calibration(&self, layer: &MoeLayer) -> Result<Option<Calibration>> {
        let Some(path) = &self.options.calibration else {
            return Ok(None);
        };
        let name = input_name(layer);
        let inputs = Checkpoint::open(path)?.tensor(&name)?;
        if let Some(element) = inputs.first_not_finite() {
            return Err(Error::Format {
                path: path.clone(),
                reason: format!("tensor `{name}` holds a NaN or an infinity (element {element})"),
            });
        }
        let activation = self.model.config().activation()?;
        let calibration = Calibration::from_activations(&inputs)?;
        Ok(Some(calibration.with_activation(activation)))
    }

    /// The records of all layers, from their files: those of this run and of others go the same way.
    fn records(&self, shards: &[Shard]) -> Result<Vec<LayerRecord>> {
        let of_layers = shards
            .iter()
            .filter(|shard| matches!(shard.content, Content::Layer(_)));
        of_layers
            .map(|shard| {
                let path = self.folder.join(&shard.file);
                record_of(&Checkpoint::open(&path)?, &path)
            })
            .collect()
    }
}
