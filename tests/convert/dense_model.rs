//! A model's dense feed-forwards split by file: what is written is a mixture that the family reader opens, and computes what the source did.

use std::path::Path;

use half::bf16;
use rankmix::convert::{DenseModelOptions, convert_dense_model};
use rankmix::formats::{
    Dtype, GgufType, GgufWriter, ModelWriter, MoeLayout, MoeModel, OutputTensor,
};
use rankmix::{Error, Tensor};

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

fn safetensors_model(folder: &Path, activation: &str) {
    std::fs::create_dir_all(folder).expect("a folder");
    let mut tensors = Vec::new();
    let mut add = |name: String, tensor: &Tensor| {
        let data = tensor.to_f32();
        tensors.push(
            OutputTensor::floats(name, tensor.shape().dims(), data.into(), Dtype::BF16)
                .expect("it is finite"),
        );
    };
    for layer in 0..2_u64 {
        for (part, tensor) in ["gate", "up", "down"].iter().zip(&matrices(layer)) {
            add(
                format!("model.layers.{layer}.mlp.{part}_proj.weight"),
                tensor,
            );
        }
        add(
            format!("model.layers.{layer}.post_attention_layernorm.weight"),
            &norm(),
        );
    }
    let writer = ModelWriter::new(folder);
    writer
        .write_shard(
            "model.safetensors",
            tensors,
            std::collections::BTreeMap::new(),
        )
        .expect("it is written");
    let config = format!(
        "{{\"model_type\": \"llama\", \"hidden_act\": \"{activation}\", \"hidden_size\": {HIDDEN}, \"intermediate_size\": {NEURONS}}}"
    );
    std::fs::write(folder.join("config.json"), config).expect("it is written");
    std::fs::write(folder.join("tokenizer.json"), "{}").expect("it is written");
}

fn gguf_model(path: &Path) {
    let mut named = Vec::new();
    for layer in 0..2_u64 {
        for (part, tensor) in ["gate", "up", "down"].iter().zip(matrices(layer)) {
            named.push((format!("blk.{layer}.ffn_{part}.weight"), tensor));
        }
        named.push((format!("blk.{layer}.ffn_norm.weight"), norm()));
    }
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

/// Every neuron of the dense layer is one of the mixture's, with the down projection times the number of experts.
fn check_neurons(model: &MoeModel, bf16_down: bool) {
    assert_eq!(model.layers().len(), 2);
    for (layer, of_model) in model.layers().iter().enumerate() {
        let moe = model.experts(of_model).expect("it is read");
        assert_eq!(moe.extents().expect("they fit"), [5, 4, HIDDEN]);
        let [gate, _, down] = matrices(layer as u64).map(|tensor| tensor.to_f32());
        let (moe_gate, moe_down) = (moe.gate.to_f32(), moe.down.to_f32());
        let mut found = 0;
        for (neuron, row) in gate.chunks(HIDDEN).enumerate() {
            let place = moe_gate.chunks(HIDDEN).position(|other| other == row);
            let place = place.expect("no neuron is lost");
            found += 1;
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
            let reports =
                convert_dense_model(path, &out, &options(layout), &|_, _| {}).expect("it converts");
            assert_eq!(reports.len(), 2);
            let model = MoeModel::open(&out).expect("the family reader opens it");
            check_neurons(&model, from == "safetensors");
            let routing = model
                .config()
                .routing(5, false)
                .expect("the configuration says how tokens are routed");
            assert_eq!(routing.renormalize, layout == MoeLayout::Mixtral);
            assert_eq!(routing.top_k, 5);
            assert_eq!(out.join("tokenizer.json").exists(), from == "safetensors");
            let again = convert_dense_model(path, &out, &options(layout), &|_, _| {});
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
    let error = convert_dense_model(&source, &out, &options(MoeLayout::Mixtral), &|_, _| {})
        .expect_err("another activation");
    assert!(error.to_string().contains("gelu"), "{error}");
    safetensors_model(&source, "silu");
    let other = DenseModelOptions {
        experts: 3,
        top_k: 1,
        ..options(MoeLayout::Mixtral)
    };
    let error = convert_dense_model(&source, &out, &other, &|_, _| {}).expect_err("3 of 20");
    assert!(error.to_string().contains("20 neurons"), "{error}");
    let error = convert_dense_model(&source, &out, &options(MoeLayout::Fused), &|_, _| {})
        .expect_err("another layout");
    assert!(matches!(error, Error::Setting { .. }));
    assert!(!out.exists() && !folder.path().join("out.partial").exists());
    let there = options(MoeLayout::Mixtral);
    convert_dense_model(&source, &out, &there, &|_, _| {}).expect("it converts");
    convert_dense_model(&source, &out, &there, &|_, _| {}).expect_err("it is there already");
    let over = DenseModelOptions {
        overwrite: true,
        ..there
    };
    convert_dense_model(&source, &out, &over, &|_, _| {}).expect("it may be replaced");
}
