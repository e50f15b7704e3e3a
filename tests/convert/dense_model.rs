//! A model's dense feed-forwards split by file: what is written is a mixture that the family reader opens, and computes what the source did.

mod configuration;
mod refused;
mod resumed;

use std::path::Path;

use half::bf16;
use rankmix::convert::{DenseModelOptions, convert_dense_model};
use rankmix::formats::{
    Dtype, GgufType, GgufWriter, ModelWriter, MoeLayout, MoeModel, OutputTensor,
};
use rankmix::{Error, Tensor};
use serde_json::{Value, json};

use crate::random::Random;

const HIDDEN: usize = 12;
const NEURONS: usize = 20;

/// The feed-forward of layer 0 or 1: gate, up, down, rounded as the file has them.
fn matrices(layer: u64) -> [Tensor; 3] {
    let mut random = Random::new(layer);
    let mut matrix = |rows: usize, columns: usize| {
        let data = random.matrix(rows, columns);
        let data = data.iter().map(|&x| bf16::from_f64(x).to_f32()).collect();
        Tensor::f32([rows, columns], data).expect("the shape fits")
    };
    [
        matrix(NEURONS, HIDDEN),
        matrix(NEURONS, HIDDEN),
        matrix(HIDDEN, NEURONS),
    ]
}

fn norm() -> Tensor {
    Tensor::f32([HIDDEN], vec![0.5; HIDDEN]).expect("the shape fits")
}

/// The tensors of a model of so many layers, by their names.
fn tensors_of(layers: u64) -> Vec<(String, Tensor)> {
    let mut named = Vec::new();
    for layer in 0..layers {
        for (part, tensor) in ["gate", "up", "down"].iter().zip(matrices(layer)) {
            named.push((
                format!("model.layers.{layer}.mlp.{part}_proj.weight"),
                tensor,
            ));
        }
        named.push((
            format!("model.layers.{layer}.post_attention_layernorm.weight"),
            norm(),
        ));
    }
    named
}

fn write_model(folder: &Path, named: &[(String, Tensor)], dtype: Dtype, config: &Value) {
    std::fs::create_dir_all(folder).expect("a folder");
    let tensors = named.iter().map(|(name, tensor)| {
        let dims = tensor.shape().dims();
        OutputTensor::floats(name.clone(), dims, tensor.to_f32().into(), dtype).expect("it fits")
    });
    ModelWriter::new(folder)
        .write_shard(
            "model.safetensors",
            tensors.collect(),
            std::collections::BTreeMap::new(),
        )
        .expect("it is written");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("it is written");
    std::fs::write(folder.join("tokenizer.json"), "{}").expect("it is written");
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": NEURONS,
        "num_attention_heads": 4, "num_hidden_layers": 2,
    })
}

fn safetensors_model(folder: &Path, activation: &str) {
    let mut config = config();
    config["hidden_act"] = activation.into();
    write_model(folder, &tensors_of(2), Dtype::BF16, &config);
}

fn gguf_model(path: &Path) {
    write_gguf(path, &[]);
}

/// A model of two layers, with these tensors besides, or in place of those of the same name.
fn write_gguf(path: &Path, more: &[(String, Tensor)]) {
    let mut named = std::collections::BTreeMap::new();
    for layer in 0..2_u64 {
        for (part, tensor) in ["gate", "up", "down"].iter().zip(matrices(layer)) {
            named.insert(format!("blk.{layer}.ffn_{part}.weight"), tensor);
        }
        named.insert(format!("blk.{layer}.ffn_norm.weight"), norm());
    }
    named.extend(more.iter().cloned());
    let mut writer = GgufWriter::new();
    for (name, tensor) in &named {
        writer.tensor(name, tensor, GgufType::F32).expect("it fits");
    }
    writer.write(path).expect("it is written");
}

fn options(layout: MoeLayout) -> DenseModelOptions {
    DenseModelOptions {
        experts: 5,
        top_k: 5,
        layout,
        activations: None,
        seed: 1,
        overwrite: false,
        restart: false,
    }
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::f32(shape, vec![0.0; shape.iter().product()]).expect("the shape fits")
}

/// Every neuron of the dense layer is one of the mixture's, with the down projection times the number of experts.
fn check_neurons(model: &MoeModel, bf16_down: bool) {
    assert_eq!(model.layers().len(), 2);
    for (layer, of_model) in model.layers().iter().enumerate() {
        let moe = model.experts(of_model).expect("it is read");
        assert_eq!(moe.extents().expect("they fit"), [5, 4, HIDDEN]);
        let [gate, up, down] = matrices(layer as u64).map(|tensor| tensor.to_f32());
        let (moe_gate, moe_up, moe_down) = (moe.gate.to_f32(), moe.up.to_f32(), moe.down.to_f32());
        let mut found = 0;
        for (neuron, row) in gate.chunks(HIDDEN).enumerate() {
            let place = moe_gate.chunks(HIDDEN).position(|other| other == row);
            let place = place.expect("no neuron is lost");
            found += 1;
            assert_eq!(
                moe_up[place * HIDDEN..][..HIDDEN],
                up[neuron * HIDDEN..][..HIDDEN]
            );
            for hidden in 0..HIDDEN {
                let there = moe_down[(place / 4 * HIDDEN + hidden) * 4 + place % 4];
                let mut expected = 5.0 * down[hidden * NEURONS + neuron];
                if bf16_down {
                    expected = bf16::from_f32(expected).to_f32();
                }
                assert_eq!(there, expected);
            }
        }
        assert_eq!(found, NEURONS);
        let router = model.router(of_model).expect("it is read").to_f32();
        assert!(router.iter().all(|x| x.abs() < 1e-7) && router.iter().any(|&x| x != 0.0));
    }
}

#[test]
fn models_in_both_formats_become_mixtures_in_both_layouts() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("dense");
    safetensors_model(&source, "silu");
    let gguf = folder.path().join("files").join("dense.gguf");
    std::fs::create_dir(folder.path().join("files")).expect("a folder");
    gguf_model(&gguf);
    for (name, layout) in [
        ("mixtral", MoeLayout::Mixtral),
        ("qwen", MoeLayout::PerExpert),
    ] {
        for (from, path) in [("safetensors", &source), ("gguf", &gguf)] {
            let out = folder.path().join(format!("{name}-{from}"));
            let report =
                convert_dense_model(path, &out, &options(layout), &|_| {}).expect("it converts");
            assert_eq!(report.layers.len(), 2);
            let model = MoeModel::open(&out).expect("the family reader opens it");
            check_neurons(&model, from == "safetensors");
            let routing = model
                .config()
                .routing(5, false)
                .expect("the configuration says how tokens are routed");
            assert_eq!(routing.renormalize, layout == MoeLayout::Mixtral);
            assert_eq!(routing.top_k, 5);
            assert_eq!(out.join("tokenizer.json").exists(), from == "safetensors");
            let again = convert_dense_model(path, &out, &options(layout), &|_| {});
            assert!(
                matches!(again, Err(Error::File { .. })),
                "it is there already"
            );
        }
    }
}

#[test]
fn what_cannot_be_split_leaves_no_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("dense");
    safetensors_model(&source, "gelu");
    let out = folder.path().join("out");
    let error = convert_dense_model(&source, &out, &options(MoeLayout::Mixtral), &|_| {})
        .expect_err("another activation");
    assert!(error.to_string().contains("gelu"), "{error}");
    safetensors_model(&source, "silu");
    let other = DenseModelOptions {
        experts: 3,
        top_k: 1,
        ..options(MoeLayout::Mixtral)
    };
    let error = convert_dense_model(&source, &out, &other, &|_| {}).expect_err("3 of 20");
    assert!(error.to_string().contains("20 neurons"), "{error}");
    let error = convert_dense_model(&source, &out, &options(MoeLayout::Fused), &|_| {})
        .expect_err("another layout");
    assert!(matches!(error, Error::Setting { .. }));
    assert!(!out.exists() && !folder.path().join("out.partial").exists());
    let there = options(MoeLayout::Mixtral);
    convert_dense_model(&source, &out, &there, &|_| {}).expect("it converts");
    convert_dense_model(&source, &out, &there, &|_| {}).expect_err("it is there already");
    let over = DenseModelOptions {
        overwrite: true,
        ..there
    };
    convert_dense_model(&source, &out, &over, &|_| {}).expect("it may be replaced");
}
