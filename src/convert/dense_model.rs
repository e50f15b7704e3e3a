//! A model whose dense feed-forwards become mixtures of experts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::convert::dense_config::{config_of, warnings};
use crate::convert::dense_source::{DenseLayers, DenseSource};
use crate::convert::model_report::peak_memory_bytes;
use crate::convert::plan::{ARITHMETIC_VERSION, RECORD, record_of};
use crate::convert::stage::{Fingerprint, Replacement, Stage, json_of};
use crate::convert::{
    DenseGates, DenseOptions, DenseReport, Listener, Progress, RunFacts, normed_inputs, split_dense,
};
use crate::error::{Error, Result};
use crate::file;
use crate::formats::{
    Checkpoint, Dtype, ModelWriter, MoeLayout, OutputTensor, expert_shapes, write_json,
};
use crate::tensor::Tensor;

/// How a model's feed-forwards are split.
#[derive(Clone, Debug)]
pub struct DenseModelOptions {
    /// E.
    pub experts: usize,
    /// How many experts a token takes.
    pub top_k: usize,
    /// [`MoeLayout::Mixtral`], whose gates are over the chosen experts, or [`MoeLayout::PerExpert`], written as Qwen3-MoE's without `norm_topk_prob`, whose gates
    /// are over all.
    pub layout: MoeLayout,
    /// A safetensors file with inputs of each layer's feed-forward, `model.layers.{i}.mlp.input` `[tokens, n]`; random directions times the weights of the
    /// norm before the layer otherwise.
    pub activations: Option<PathBuf>,
    /// Of everything random.
    pub seed: u64,
    /// An output that is there is replaced when the new one is whole, if a conversion has made it.
    pub overwrite: bool,
    /// What another conversion has left unfinished under the output's name is thrown away.
    pub restart: bool,
}

/// What became of a model's layers, by their paths; in `conversion.json` under `layers`, and in the metadata of the layer's file, so that both are there or neither.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DenseLayerReport {
    /// The path of the mixture, such as `model.layers.0.mlp`.
    pub path: String,
    /// What became of it.
    pub report: DenseReport,
}

/// `conversion.json`, but for options and source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DenseModelReport {
    /// What the user should know: where a program that loads the result by its `model_type` computes something else than the source's beside the feed-forwards, and what rounds.
    pub warnings: Vec<String>,
    /// What of the source's folder was not copied: other files of weights, which are of the model as it was; links to folders, and what else is no file.
    pub not_copied: Vec<String>,
    /// The layers.
    pub layers: Vec<DenseLayerReport>,
    /// What belongs to the run and not to the result.
    pub run: RunFacts,
}

/// Splits every dense feed-forward of a model and writes the result as a folder in the layout of an MoE, one layer in memory at a time, each in a file of its own.
///
/// The model is a Llama-like folder in safetensors, of which everything else is copied, or a GGUF file of the Llama family, of which feed-forwards and their norms are
/// written, in 32 bits. Experts are written in the type that the source has; routers in 32 bits, because their numbers are tiny. `listener` is told how many of how many files are
/// written. The output gets its name when it is whole. Run again after it was ended, with equal options, the conversion goes on with the layers that are not written yet; the result is the
/// same bit for bit.
///
/// # Errors
/// [`Error::Setting`] for another layout, and as [`split_dense`]; [`Error::Format`], with the tensor's name and its file, if a matrix is missing or has another shape than in other layers, a
/// layer has biases, or a number is not finite, and for another activation than SiLU; [`Error::File`] if a file cannot be read, `out` is there already, or an unfinished conversion with other
/// options is in the way; [`Error::Limit`] if a matrix times its factor is beyond what its type holds. All but
/// numbers is found before anything is written.
pub fn convert_dense_model(
    model: &Path,
    out: &Path,
    options: &DenseModelOptions,
    listener: Listener<'_>,
) -> Result<DenseModelReport> {
    let (gates, module) = match options.layout {
        MoeLayout::Mixtral => (DenseGates::Chosen, "block_sparse_moe"),
        MoeLayout::PerExpert => (DenseGates::All, "mlp"),
        other => {
            return Err(Error::setting(
                "layout",
                other.name(),
                "Mixtral's and Qwen-MoE's are written",
            ));
        }
    };
    let split = DenseOptions {
        experts: options.experts,
        top_k: options.top_k,
        gates,
        seed: options.seed,
    };
    let source = DenseSource::open(model)?;
    let layers = source.layers()?;
    split.check(layers.neurons)?;
    check_inputs(&source, layers, options)?;
    let config = config_of(&source, layers, options)?;
    let warnings = warnings(&source, layers, options)?;
    let activations = options.activations.as_deref();
    let fingerprint = Fingerprint {
        options: json!({
            "experts": options.experts, "top_k": options.top_k, "layout": options.layout, "activations": activations.is_some(), "seed": options.seed,
            "arithmetic": ARITHMETIC_VERSION, "rankmix": env!("CARGO_PKG_VERSION"),
        }),
        source: source.identity(activations)?,
    };
    let replacement = Replacement {
        overwrite: options.overwrite,
        restart: options.restart,
    };
    let sources: Vec<&Path> = std::iter::once(model).chain(activations).collect();
    let stage = Stage::open(out, &sources, &fingerprint, replacement)?;
    if let Some(notice) = &stage.notice {
        listener(Progress::Notice(notice));
    }
    let work = Work {
        model,
        source: &source,
        layers,
        module,
        split,
        options,
        folder: stage.folder(),
    };
    let files = work.files();
    let missing: Vec<usize> = (0..files.len())
        .filter(|&number| !work.is_written(number, &files[number]))
        .collect();
    let tell = |finished| {
        listener(Progress::Written {
            finished,
            of: files.len(),
        });
    };
    let earlier = files.len() - missing.len();
    tell(earlier);
    for (done, &number) in missing.iter().enumerate() {
        work.write(number, &files[number])?;
        tell(earlier + done + 1);
    }
    let reports = files[..layers.count]
        .iter()
        .map(|file| {
            let path = stage.folder().join(file);
            record_of(&Checkpoint::open(&path)?, &path)
        })
        .collect::<Result<_>>()?;
    ModelWriter::new(stage.folder()).write_index(&files)?;
    write_json(&stage.folder().join("config.json"), &Value::Object(config))?;
    let not_copied = source.copy_others(stage.folder())?;
    // What was read is what was there at the beginning, or the parts do not fit each other.
    if DenseSource::open(model)?.identity(activations)? != fingerprint.source {
        return Err(file::damaged(model)(
            "its files were changed while they were converted".to_owned(),
        ));
    }
    let report = DenseModelReport {
        warnings,
        not_copied,
        layers: reports,
        run: RunFacts {
            files_written: missing.len(),
            files_of_earlier_runs: earlier,
            peak_memory_bytes: peak_memory_bytes(),
        },
    };
    stage.publish_with("dense_to_moe", &fingerprint, &report)?;
    Ok(report)
}

/// The name of a layer's inputs in a file of activations.
fn input_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.input")
}

/// Checks what routers are made with, by the headers.
fn check_inputs(
    source: &DenseSource,
    layers: DenseLayers,
    options: &DenseModelOptions,
) -> Result<()> {
    if options.activations.is_none() || matches!(source, DenseSource::Gguf { .. }) {
        source.check_norms(layers)?;
    }
    let Some(path) = &options.activations else {
        return Ok(());
    };
    let file = Checkpoint::open(path)?;
    for layer in 0..layers.count {
        let name = input_name(layer);
        let [tokens, width] = file.matrix(&name)?;
        if width != layers.hidden {
            let expected = layers.hidden;
            return Err(file.wrong(
                &name,
                &format!("[{tokens}, {width}]: [tokens, {expected}] is expected"),
            ));
        }
        if tokens < 4 {
            return Err(file.wrong(&name, &format!("{tokens} tokens: at least 4 make a router")));
        }
    }
    Ok(())
}

/// The files of one conversion: first one for each layer, then one of what is copied.
struct Work<'a> {
    model: &'a Path,
    source: &'a DenseSource,
    layers: DenseLayers,
    /// The name of mixtures in their layer.
    module: &'a str,
    split: DenseOptions,
    options: &'a DenseModelOptions,
    folder: &'a Path,
}

impl Work<'_> {
    fn files(&self) -> Vec<String> {
        let count = self.layers.count + 1;
        (1..=count)
            .map(|number| ModelWriter::shard_name(number, count))
            .collect()
    }

    /// The path of a mixture.
    fn path(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.module)
    }

    /// Whether a run before this one has written the file: it is whole, because files get their names when they are, and holds what it must.
    fn is_written(&self, number: usize, file: &str) -> bool {
        let path = self.folder.join(file);
        // Whatever is wrong with it, it is written again.
        let Ok(file) = Checkpoint::open(&path) else {
            return false;
        };
        let has = |name: &str, shape: &[usize], dtype: Dtype| {
            let entry = file.entry(name);
            entry.is_some_and(|entry| entry.shape == shape && entry.dtype == dtype)
        };
        let count = file.tensors().count();
        if number == self.layers.count {
            let kept = self.source.kept(self.layers);
            return count == kept.len()
                && kept
                    .iter()
                    .all(|kept| has(&kept.name, &kept.shape, kept.dtype));
        }
        let (path_of_layer, dtype) = (self.path(number), self.source.dtype(number));
        let (experts, n) = (self.split.experts, self.layers.hidden);
        let widths = [n, self.layers.neurons / experts];
        let mut shapes = expert_shapes(&path_of_layer, self.options.layout, experts, widths);
        count == 3 * experts + 1
            && has(&router_name(&path_of_layer), &[experts, n], Dtype::F32)
            && shapes.all(|(name, shape)| has(&name, &shape, dtype))
            && record_of(&file, &path)
                .is_ok_and(|record: DenseLayerReport| record.path == path_of_layer)
    }

    fn write(&self, number: usize, file: &str) -> Result<()> {
        // Mapped anew each time, so that what was read is given back.
        let source = DenseSource::open(self.model)?;
        if number < self.layers.count {
            return self.layer(number, file, &source);
        }
        let tensors = source.kept_tensors(self.layers)?;
        ModelWriter::new(self.folder).write_shard(file, tensors, BTreeMap::new())
    }

    fn layer(&self, layer: usize, file: &str, source: &DenseSource) -> Result<()> {
        let (moe, router, report) = {
            let inputs = self.inputs(layer, source)?;
            let split = split_dense(&source.feed_forward(layer)?, &inputs, &self.split);
            // The matrices and the inputs were finite when they were read.
            split.map_err(|error| match error {
                Error::NotFinite { value, .. } => file::damaged(self.model)(format!(
                    "layer {layer}: {value} are beyond what 32 bits hold"
                )),
                other => other,
            })?
        };
        let path = self.path(layer);
        let mut tensors = vec![OutputTensor::floats(
            router_name(&path),
            router.shape().dims(),
            router.to_f32().into(),
            Dtype::F32,
        )?];
        for matrix in moe.named(&path, self.options.layout)? {
            let dtype = self.source.dtype(layer);
            let (name, elements) = (matrix.name, matrix.elements);
            tensors.push(OutputTensor::floats(name, &matrix.shape, elements, dtype)?);
        }
        let record = json_of(file, &DenseLayerReport { path, report })?;
        let metadata = BTreeMap::from([(RECORD.to_owned(), record.to_string())]);
        ModelWriter::new(self.folder).write_shard(file, tensors, metadata)
    }

    /// What the router of a layer is made with.
    fn inputs(&self, layer: usize, source: &DenseSource) -> Result<Tensor> {
        match &self.options.activations {
            Some(path) => Checkpoint::open(path)?.finite_tensor(&input_name(layer)),
            None => {
                let tokens = 2048.max(4 * self.layers.hidden);
                let seed = self.options.seed.wrapping_add(layer as u64);
                normed_inputs(&source.norm(layer)?, tokens, seed)
            }
        }
    }
}

fn router_name(path: &str) -> String {
    format!("{path}.gate.weight")
}
