//! The configuration of a dense model as that of a mixture, and what the mixture's family does otherwise than the dense one's.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::convert::DenseModelOptions;
use crate::convert::dense_source::{DenseLayers, DenseSource};
use crate::error::Result;
use crate::file;
use crate::formats::{Dtype, MoeLayout};

/// The families whose layers are those of the two that are written, but for what [`warnings`] names.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];
/// What a layer of either family has beside its feed-forward; the buffers of older checkpoints are computed anew by any program.
const COMMON: [&str; 7] = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.rotary_emb.inv_freq",
];
/// What a layer of Qwen3-MoE's has besides.
const QWEN_NORMS: [&str; 2] = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"];
/// What it has where `attention_bias` is true.
const QWEN_BIASES: [&str; 4] = [
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.bias",
];

/// The `model_type` of a layout that is written.
fn written_family(layout: MoeLayout) -> &'static str {
    match layout {
        MoeLayout::Mixtral => "mixtral",
        _ => "qwen3_moe",
    }
}

fn text<'a>(keys: &'a Map<String, Value>, key: &str) -> &'a str {
    keys.get(key).and_then(Value::as_str).unwrap_or("")
}

fn flag(keys: &Map<String, Value>, key: &str) -> bool {
    keys.get(key).and_then(Value::as_bool).unwrap_or(false)
}

/// The configuration that is written: the source's, with the keys of the mixture. The widths are those of the tensors.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format) as [`DenseSource::config`], and if it says another number of layers.
pub(crate) fn config_of(
    source: &DenseSource,
    layers: DenseLayers,
    options: &DenseModelOptions,
) -> Result<Map<String, Value>> {
    let mut keys = source.config()?;
    if let Some(count) = keys.get("num_hidden_layers").and_then(Value::as_u64)
        && count != layers.count as u64
    {
        return Err(file::damaged(&source.config_path())(format!(
            "it says that there are {count} layers, and the tensors are of {} dense feed-forwards",
            layers.count
        )));
    }
    defaults(&mut keys);
    let each = layers.neurons / options.experts.max(1);
    let family = written_family(options.layout);
    let more = match options.layout {
        MoeLayout::Mixtral => json!({
            "model_type": family, "architectures": ["MixtralForCausalLM"], "num_local_experts": options.experts,
            "num_experts_per_tok": options.top_k, "intermediate_size": each,
        }),
        _ => json!({
            "model_type": family, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": options.experts,
            "num_experts_per_tok": options.top_k, "moe_intermediate_size": each, "norm_topk_prob": false,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": layers.neurons,
        }),
    };
    if let Value::Object(more) = more {
        keys.extend(more);
    }
    keys.insert("hidden_size".to_owned(), json!(layers.hidden));
    keys.insert("num_hidden_layers".to_owned(), json!(layers.count));
    Ok(keys)
}

/// What the dense family takes for keys that are not there, where the mixture's family would take something else.
fn defaults(keys: &mut Map<String, Value>) {
    let family = text(keys, "model_type").to_owned();
    // The windows of Qwen's families are used only if that is said too.
    let windows = family == "mistral" || flag(keys, "use_sliding_window");
    if !windows {
        keys.insert("sliding_window".to_owned(), Value::Null);
    }
    if !FAMILIES.contains(&family.as_str()) {
        return;
    }
    let heads = keys
        .get("num_attention_heads")
        .and_then(Value::as_u64)
        .unwrap_or(32);
    let key_heads = match family.as_str() {
        "llama" => heads,
        "mistral" => 8,
        _ => 32,
    };
    let mut more = vec![
        ("rms_norm_eps", json!(1e-6)),
        ("num_attention_heads", json!(heads)),
        ("num_key_value_heads", json!(key_heads)),
    ];
    if !keys.contains_key("rope_parameters") {
        more.push(("rope_theta", json!(10_000.0)));
    }
    if family == "mistral" {
        more.push(("sliding_window", json!(4096)));
    }
    if family == "qwen3" {
        more.push(("head_dim", json!(128)));
    }
    for (key, value) in more {
        keys.entry(key).or_insert(value);
    }
}

/// What whoever uses the result should know.
pub(crate) fn warnings(
    source: &DenseSource,
    layers: DenseLayers,
    options: &DenseModelOptions,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    match source {
        DenseSource::Gguf { .. } => warnings.push(
            "of a GGUF file the feed-forwards and their norms alone are written: without attention and embeddings no program can run the model"
                .to_owned(),
        ),
        DenseSource::Safetensors { .. } => {
            warnings.extend(differences(source, &source.config()?, options.layout));
        }
    }
    let dtypes: Vec<Dtype> = (0..layers.count).map(|layer| source.dtype(layer)).collect();
    let factor = match options.layout {
        MoeLayout::Mixtral => options.top_k,
        _ => options.experts,
    };
    if !factor.is_power_of_two()
        && let Some(dtype) = dtypes.iter().find(|dtype| **dtype != Dtype::F32)
    {
        warnings.push(format!(
            "down projections are multiplied by {factor}, which rounds in {dtype:?}: a power of two would be exact"
        ));
    }
    if dtypes.contains(&Dtype::F16) {
        warnings.push(
            "routers are in 32 bits because their numbers are below what F16 holds: a program that makes them F16 makes them zeros, and every token takes the same experts"
                .to_owned(),
        );
    }
    Ok(warnings)
}

/// Where a program that loads the result by its `model_type` computes something else beside the feed-forwards.
fn differences(
    source: &DenseSource,
    keys: &Map<String, Value>,
    layout: MoeLayout,
) -> Option<String> {
    let written = written_family(layout);
    let family = text(keys, "model_type");
    let mut known: BTreeSet<&str> = COMMON.into();
    let is_qwen = layout == MoeLayout::PerExpert;
    if is_qwen {
        known.extend(QWEN_NORMS);
        if flag(keys, "attention_bias") {
            known.extend(QWEN_BIASES);
        }
    }
    let there: BTreeSet<&str> = source
        .of_layers()
        .map(|(_, rest)| rest)
        .filter(|rest| !rest.starts_with("mlp."))
        .collect();
    let listed = |names: Vec<&str>| names.join("`, `");
    let mut reasons = Vec::new();
    let unknown: Vec<&str> = there.difference(&known).copied().collect();
    if !unknown.is_empty() {
        reasons.push(format!(
            "it leaves out `{}`, which its layers do not have",
            listed(unknown)
        ));
    }
    let has_attention = there.iter().any(|rest| rest.starts_with("self_attn."));
    let missing: Vec<&str> = QWEN_NORMS
        .into_iter()
        .filter(|name| !there.contains(name))
        .collect();
    if is_qwen && has_attention && !missing.is_empty() {
        reasons.push(format!(
            "its attention has `{}`, which the model lacks (the Mixtral layout has none)",
            listed(missing)
        ));
    }
    if !FAMILIES.contains(&family) {
        reasons.push(format!(
            "what a `model_type` \"{family}\" does otherwise is not known"
        ));
    }
    if flag(keys, "use_sliding_window") {
        reasons.push("its attention has windows in other layers".to_owned());
    }
    (!reasons.is_empty()).then(|| {
        format!(
            "feed-forwards are what they were, but a program that loads the model as \"{written}\" computes something else: {}",
            reasons.join("; ")
        )
    })
}
