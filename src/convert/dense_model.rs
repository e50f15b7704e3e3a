//! A model whose dense feed-forwards become mixtures of experts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::convert::dense_source::DenseSource;
use crate::convert::stage::{Fingerprint, Replacement, Stage};
use crate::convert::{DenseGates, DenseOptions, DenseReport, normed_inputs, split_dense};
use crate::error::{Error, Result};
use crate::formats::{
    Checkpoint, Dtype, ModelWriter, MoeExperts, MoeLayout, OutputTensor, write_json,
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

/// What became of a model's layers, by their paths; in `conversion.json` under `layers`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DenseLayerReport {
    /// The path of the mixture, such as `model.layers.0.mlp`.
    pub path: String,
    /// What became of it.
    pub report: DenseReport,
}

/// Splits every dense feed-forward of a model and writes the result as a folder in the layout of an MoE, one layer in memory at a time.
///
/// The model is a Llama-like folder in safetensors, of which everything else is copied, or a GGUF file of the Llama family, of which feed-forwards and their norms are
/// written, in 32 bits. Experts are written in the type that the source has; routers in 32 bits, because their numbers are tiny. `progress` is told how many of how many layers are
/// done. The output gets its name when it is whole.
///
/// # Errors
/// As [`split_dense`]; [`Error::Format`] or [`Error::File`] if the model cannot be read, has biases or another activation than SiLU, or the output is there already;
/// [`Error::Setting`] for another layout.
pub fn convert_dense_model(
    model: &Path,
    out: &Path,
    options: &DenseModelOptions,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<DenseLayerReport>> {
    let (gates, module, names) = match options.layout {
        MoeLayout::Mixtral => (DenseGates::Chosen, "block_sparse_moe", ["w1", "w3", "w2"]),
        MoeLayout::PerExpert => (
            DenseGates::All,
            "mlp",
            ["gate_proj", "up_proj", "down_proj"],
        ),
        other => {
            return Err(Error::setting(
                "layout",
                other.name(),
                "Mixtral's and Qwen-MoE's are written",
            ));
        }
    };
    let source = DenseSource::open(model)?;
    let layers = source.layers()?;
    let config = config_of(source.config()?, options)?;
    let activations = options
        .activations
        .as_ref()
        .map(Checkpoint::open)
        .transpose()?;
    let described = json!({
        "kind": "dense-to-moe", "experts": options.experts, "top_k": options.top_k, "layout": options.layout,
        "activations": options.activations, "seed": options.seed,
    });
    let fingerprint = Fingerprint {
        options: described.clone(),
        source: source.identity()?,
    };
    let split = DenseOptions {
        experts: options.experts,
        top_k: options.top_k,
        gates,
        seed: options.seed,
    };
    // Before anything is made.
    if let Some(first) = layers.first() {
        split.check(source.feed_forward(*first)?.gate.shape().rows())?;
    }
    let replacement = Replacement {
        overwrite: options.overwrite,
        restart: options.restart,
    };
    let stage = Stage::open(out, &[model], &fingerprint, replacement)?;
    let writer = ModelWriter::new(stage.folder());
    let shards = layers.len() + 1;
    let mut files = Vec::new();
    let mut reports = Vec::new();
    for (done, &layer) in layers.iter().enumerate() {
        progress(done, layers.len());
        let dense = source.feed_forward(layer)?;
        let inputs = match &activations {
            Some(file) => file.tensor(&format!("model.layers.{layer}.mlp.input"))?,
            None => {
                let norm = source.norm(layer)?;
                let hidden = dense.gate.shape().last();
                if norm.shape().dims() != [hidden] {
                    return Err(Error::shape(
                        "norm",
                        format!(
                            "layer {layer}: {:?}, and its feed-forward reads {hidden} numbers a token",
                            norm.shape().dims()
                        ),
                    ));
                }
                let tokens = 2048.max(4 * norm.shape().elements());
                normed_inputs(&norm, tokens, options.seed.wrapping_add(layer as u64))?
            }
        };
        let (moe, router, report) = split_dense(&dense, &inputs, &split)?;
        let path = format!("model.layers.{layer}.{module}");
        let file = ModelWriter::shard_name(done + 1, shards);
        let tensors = tensors(&path, names, &moe, &router, source.dtype(layer))?;
        writer.write_shard(&file, tensors, BTreeMap::new())?;
        files.push(file);
        reports.push(DenseLayerReport { path, report });
    }
    let file = ModelWriter::shard_name(shards, shards);
    writer.write_shard(&file, source.others(&layers)?, BTreeMap::new())?;
    files.push(file);
    writer.write_index(&files)?;
    write_json(&stage.folder().join("config.json"), &Value::Object(config))?;
    let left = source.copy_others(stage.folder())?;
    stage.publish(&json!({
        "options": described, "source": fingerprint.source, "layers": reports, "not_copied": left,
    }))?;
    progress(layers.len(), layers.len());
    Ok(reports)
}

fn tensors<'a>(
    path: &str,
    names: [&str; 3],
    moe: &'a MoeExperts,
    router: &'a Tensor,
    dtype: Dtype,
) -> Result<Vec<OutputTensor<'a>>> {
    let mut tensors = vec![OutputTensor::floats(
        format!("{path}.gate.weight"),
        router.shape().dims(),
        router.to_f32().into(),
        Dtype::F32,
    )?];
    for (name, tensor) in names.into_iter().zip([&moe.gate, &moe.up, &moe.down]) {
        let dims = tensor.shape().dims();
        let data = tensor.as_f32().unwrap_or_default();
        for (expert, matrix) in data.chunks(dims[1] * dims[2]).enumerate() {
            tensors.push(OutputTensor::floats(
                format!("{path}.experts.{expert}.{name}.weight"),
                &dims[1..],
                matrix.into(),
                dtype,
            )?);
        }
    }
    Ok(tensors)
}

fn config_of(
    mut keys: Map<String, Value>,
    options: &DenseModelOptions,
) -> Result<Map<String, Value>> {
    let width = keys
        .get("intermediate_size")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let each = width / options.experts.max(1) as u64;
    let more = match options.layout {
        MoeLayout::Mixtral => json!({
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": options.experts,
            "num_experts_per_tok": options.top_k, "intermediate_size": each, "sliding_window": null,
        }),
        _ => json!({
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": options.experts,
            "num_experts_per_tok": options.top_k, "moe_intermediate_size": each, "norm_topk_prob": false,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }),
    };
    if let Value::Object(more) = more {
        keys.extend(more);
    }
    Ok(keys)
}
