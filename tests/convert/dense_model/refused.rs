//! What cannot be split, by its tensor and its file.

use std::path::Path;

use rankmix::Tensor;
use rankmix::convert::{DenseModelOptions, convert_dense_model};
use rankmix::formats::{Dtype, MoeLayout};
use serde_json::{Value, json};

use super::{
    HIDDEN, NEURONS, config, matrices, options, tensors_of, write_gguf, write_model, zeros,
};

fn at(named: &[(String, Tensor)], name: &str) -> usize {
    let found = named.iter().position(|(other, _)| other == name);
    found.expect("it is there")
}

/// The error of a conversion that must fail before anything is written.
fn refused(source: &Path, options: &DenseModelOptions, words: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let error = convert_dense_model(source, &out, options, &|_| {}).expect_err("it is refused");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` does not name {word}");
    }
    assert!(!out.exists() && !folder.path().join("out.partial").exists());
}

/// A model of two layers with a change is refused.
fn changed_is_refused(
    change: impl Fn(&mut Vec<(String, Tensor)>, &mut Value),
    options: &DenseModelOptions,
    words: &[&str],
) {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut named, mut config) = (tensors_of(2), config());
    change(&mut named, &mut config);
    write_model(folder.path(), &named, Dtype::F32, &config);
    refused(folder.path(), options, words);
}

#[test]
fn headers_that_do_not_fit_are_refused_with_the_tensor_before_anything_is_written() {
    const UP: &str = "model.layers.1.mlp.up_proj.weight";
    let options = options(MoeLayout::Mixtral);
    let file = "model.safetensors";
    changed_is_refused(
        |named, _| {
            let up = at(named, UP);
            named[up].1 = zeros(&[NEURONS, HIDDEN + 1]);
        },
        &options,
        &[UP, file, "[20, 13]", "[20, 12]"],
    );
    // Each layer fits itself, and no configuration holds both.
    changed_is_refused(
        |named, _| {
            for (part, shape) in [
                ("gate", [40, HIDDEN]),
                ("up", [40, HIDDEN]),
                ("down", [HIDDEN, 40]),
            ] {
                let place = at(named, &format!("model.layers.1.mlp.{part}_proj.weight"));
                named[place].1 = zeros(&shape);
            }
        },
        &options,
        &[
            "model.layers.1.mlp.gate_proj.weight",
            file,
            "[40, 12]",
            "[20, 12]",
        ],
    );
    changed_is_refused(
        |named, _| {
            named.remove(at(named, UP));
        },
        &options,
        &[UP, "missing"],
    );
    let norm = "model.layers.1.post_attention_layernorm.weight";
    changed_is_refused(
        |named, _| {
            let place = at(named, norm);
            named[place].1 = zeros(&[HIDDEN - 1]);
        },
        &options,
        &[norm, file, "[11]", "[12]"],
    );
    changed_is_refused(
        |_, config| config["num_hidden_layers"] = 3.into(),
        &options,
        &["config.json", "3 layers", "2 dense"],
    );
    changed_is_refused(
        |_, config| config["hidden_activation"] = "gelu_pytorch_tanh".into(),
        &options,
        &["config.json", "hidden_activation", "gelu"],
    );
    for (name, word) in [
        ("model.layers.1.mlp.up_proj.bias", "no biases"),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "dense"),
        ("model.layers.2.block_sparse_moe.gate.weight", "dense"),
    ] {
        changed_is_refused(
            |named, _| named.push((name.to_owned(), zeros(&[NEURONS]))),
            &options,
            &[name, file, word],
        );
    }
    // Activations of another width, and too few.
    let folder = tempfile::tempdir().expect("a folder");
    for (shape, words) in [([9, 13], "[9, 13]"), ([3, 12], "at least 4")] {
        let inputs = [0, 1].map(|layer| {
            let shape = if layer == 1 { shape } else { [9, 12] };
            (format!("model.layers.{layer}.mlp.input"), zeros(&shape))
        });
        write_model(folder.path(), &inputs, Dtype::F32, &json!({}));
        let options = DenseModelOptions {
            activations: Some(folder.path().join(file)),
            ..options.clone()
        };
        changed_is_refused(
            |_, _| {},
            &options,
            &["model.layers.1.mlp.input", file, words],
        );
    }
}

#[test]
fn what_gguf_files_have_beside_a_feed_forward_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("dense.gguf");
    for name in ["blk.1.ffn_up.bias", "blk.0.ffn_gate_inp.weight"] {
        write_gguf(&path, &[(name.to_owned(), zeros(&[NEURONS]))]);
        refused(&path, &options(MoeLayout::Mixtral), &[name, "dense.gguf"]);
    }
}

#[test]
fn a_number_that_is_not_finite_is_named_with_its_tensor_and_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut nan = matrices(1)[1].to_f32();
    nan[7] = f32::INFINITY;
    let nan = Tensor::f32([NEURONS, HIDDEN], nan).expect("the shape fits");
    let mut named = tensors_of(2);
    let up = "model.layers.1.mlp.up_proj.weight";
    let place = at(&named, up);
    named[place].1 = nan.clone();
    let source = folder.path().join("in");
    write_nonfinite(&source, &named);
    let gguf = folder.path().join("dense.gguf");
    write_gguf(&gguf, &[("blk.1.ffn_up.weight".to_owned(), nan)]);
    for (path, words) in [
        (&source, [up, "model.safetensors"]),
        (&gguf, ["blk.1.ffn_up.weight", "dense.gguf"]),
    ] {
        let out = folder.path().join("out");
        let options = DenseModelOptions {
            restart: true,
            ..options(MoeLayout::Mixtral)
        };
        let error = convert_dense_model(path, &out, &options, &|_| {}).expect_err("an infinity");
        let message = error.to_string();
        for word in words.iter().chain(&["element 7"]) {
            assert!(message.contains(word), "`{message}` does not name {word}");
        }
        assert!(!out.exists());
    }
}

#[test]
fn outputs_beyond_32_bits_are_said_of_their_layer() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut named = tensors_of(2);
    let place = at(&named, "model.layers.1.mlp.down_proj.weight");
    let huge = Tensor::f32([HIDDEN, NEURONS], vec![3e38; HIDDEN * NEURONS]);
    named[place].1 = huge.expect("the shape fits");
    let source = folder.path().join("in");
    write_nonfinite(&source, &named);
    let out = folder.path().join("out");
    let options = options(MoeLayout::Mixtral);
    let error = convert_dense_model(&source, &out, &options, &|_| {}).expect_err("an infinity");
    let message = error.to_string();
    assert!(
        message.contains("layer 1: ") && message.contains("32 bits"),
        "{message}"
    );
}

/// As [`write_model`], with numbers that [`OutputTensor`] refuses.
fn write_nonfinite(folder: &Path, named: &[(String, Tensor)]) {
    write_model(folder, &tensors_of(2), Dtype::F32, &config());
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = named
        .iter()
        .map(|(name, tensor)| {
            let floats = tensor.to_f32();
            let bytes = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name.as_str(), tensor.shape().dims().to_vec(), bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("the shape fits"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .expect("it is written");
}
