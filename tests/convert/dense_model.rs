//! A model's dense feed-forwards split by file: what is written is a mixture that the family reader opens, and computes what the source did.

use std::path::Path;

use half::bf16;
use rankmix::convert::{DenseModelOptions, Progress, convert_dense_model};
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

fn at(named: &[(String, Tensor)], name: &str) -> usize {
    let found = named.iter().position(|(other, _)| other == name);
    found.expect("it is there")
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::f32(shape, vec![0.0; shape.iter().product()]).expect("the shape fits")
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

#[test]
fn the_configuration_has_the_widths_of_the_tensors_and_what_the_dense_family_takes_for_missing_keys()
 {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("in");
    let mut keys = config();
    keys.as_object_mut()
        .expect("an object")
        .remove("intermediate_size");
    write_model(&source, &tensors_of(2), Dtype::F32, &keys);
    let written = |layout: MoeLayout| -> Value {
        let out = folder.path().join(layout.name());
        convert_dense_model(&source, &out, &options(layout), &|_| {}).expect("it converts");
        let text = std::fs::read_to_string(out.join("config.json")).expect("it is there");
        serde_json::from_str(&text).expect("JSON")
    };
    let mixtral = written(MoeLayout::Mixtral);
    assert_eq!(mixtral["intermediate_size"], 4);
    // A Llama's, where Mixtral would take 1e6, 1e-5 and 8.
    assert_eq!(mixtral["rope_theta"], 10_000.0);
    assert_eq!(mixtral["rms_norm_eps"], 1e-6);
    assert_eq!(mixtral["num_key_value_heads"], 4);
    assert!(mixtral["sliding_window"].is_null());
    let qwen = written(MoeLayout::PerExpert);
    assert_eq!(qwen["moe_intermediate_size"], 4);
    assert_eq!(qwen["intermediate_size"], 20);
    // A window that is used stays.
    keys["model_type"] = "mistral".into();
    keys["sliding_window"] = 64.into();
    write_model(&source, &tensors_of(2), Dtype::F32, &keys);
    std::fs::remove_dir_all(folder.path().join(MoeLayout::Mixtral.name())).expect("the output");
    assert_eq!(written(MoeLayout::Mixtral)["sliding_window"], 64);
}

#[test]
fn what_the_layouts_family_does_otherwise_is_a_warning() {
    const QUERY: &str = "self_attn.q_proj.weight";
    const NORMS: [&str; 2] = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"];
    let warnings = |family: &str, more: &[&str], layout, experts, dtype| {
        let folder = tempfile::tempdir().expect("a folder");
        let source = folder.path().join("in");
        let mut named = tensors_of(2);
        for rest in more {
            for layer in 0..2 {
                named.push((format!("model.layers.{layer}.{rest}"), zeros(&[3])));
            }
        }
        let mut keys = config();
        keys["model_type"] = family.into();
        write_model(&source, &named, dtype, &keys);
        let options = DenseModelOptions {
            experts,
            top_k: experts,
            ..options(layout)
        };
        let out = folder.path().join("out");
        let report = convert_dense_model(&source, &out, &options, &|_| {}).expect("it converts");
        let text = std::fs::read_to_string(out.join("conversion.json")).expect("it is there");
        let written: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(written["warnings"], json!(report.warnings));
        report.warnings
    };
    let (mixtral, qwen) = (MoeLayout::Mixtral, MoeLayout::PerExpert);
    let with_norms = [QUERY, NORMS[0], NORMS[1]];
    let none: [&str; 0] = [];
    assert_eq!(warnings("llama", &[QUERY], mixtral, 4, Dtype::BF16), none);
    assert_eq!(warnings("qwen3", &with_norms, qwen, 4, Dtype::BF16), none);
    for (family, more, layout, word) in [
        ("llama", &[QUERY][..], qwen, NORMS[0]),
        ("qwen3", &with_norms[..], mixtral, NORMS[1]),
        (
            "qwen2",
            &[QUERY, "self_attn.q_proj.bias"][..],
            mixtral,
            "q_proj.bias",
        ),
        ("granite", &[QUERY][..], mixtral, "granite"),
    ] {
        let found = warnings(family, more, layout, 4, Dtype::BF16);
        assert!(
            found.len() == 1 && found[0].contains(word),
            "{family}: {found:?}"
        );
    }
    let found = warnings("llama", &[QUERY], mixtral, 5, Dtype::BF16);
    assert!(
        found.len() == 1 && found[0].contains("multiplied by 5"),
        "{found:?}"
    );
    assert_eq!(warnings("llama", &[QUERY], mixtral, 5, Dtype::F32), none);
    let found = warnings("llama", &[QUERY], mixtral, 4, Dtype::F16);
    assert!(found.len() == 1 && found[0].contains("F16"), "{found:?}");
}

/// All files of an output, the report without what belongs to the run.
fn result(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut bytes = std::fs::read(entry.path()).expect("a file");
            if name == "conversion.json" {
                let mut report: Value = serde_json::from_slice(&bytes).expect("JSON");
                let run = report.as_object_mut().and_then(|keys| keys.remove("run"));
                assert!(run.is_some());
                bytes = report.to_string().into_bytes();
            }
            (name, bytes)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_run_after_one_that_failed_goes_on_and_gives_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let [source, whole, out] = ["in", "whole", "out"].map(|name| folder.path().join(name));
    let layers = 4;
    let mut keys = config();
    keys["num_hidden_layers"] = layers.into();
    let write = |tensors: &[(String, Tensor)]| write_model(&source, tensors, Dtype::F32, &keys);
    write(&tensors_of(layers));
    let options = options(MoeLayout::Mixtral);
    convert_dense_model(&source, &whole, &options, &|_| {}).expect("it converts");

    // A damage of layer 2 that shows neither in the file's size nor in its time.
    let file = source.join("model.safetensors");
    let good = std::fs::read(&file).expect("a file");
    let time = std::fs::metadata(&file)
        .and_then(|facts| facts.modified())
        .expect("a time");
    let put = |bytes: &[u8]| {
        std::fs::write(&file, bytes).expect("it is written");
        let file = std::fs::File::options().write(true).open(&file);
        file.expect("it is there")
            .set_modified(time)
            .expect("a time");
    };
    let mut bad = good.clone();
    let gate = matrices(2)[0].to_f32();
    let gate: Vec<u8> = gate.iter().flat_map(|x| x.to_le_bytes()).collect();
    let place = bad.windows(gate.len()).position(|bytes| bytes == gate);
    let place = place.expect("it is in the file");
    bad[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    put(&bad);
    convert_dense_model(&source, &out, &options, &|_| {}).expect_err("a NaN in layer 2");
    let partial = folder.path().join("out.partial");
    let written = |folder: &Path, layer: usize| {
        let name = ModelWriter::shard_name(layer + 1, 5);
        std::fs::metadata(folder.join(name))
            .and_then(|facts| facts.modified())
            .ok()
    };
    let times: Vec<_> = (0..5).map(|layer| written(&partial, layer)).collect();
    assert_eq!(
        times.iter().map(Option::is_some).collect::<Vec<_>>(),
        [true, true, false, false, false]
    );
    // Of layer 1 something else is there under the name: it is written again.
    std::fs::copy(
        partial.join(ModelWriter::shard_name(1, 5)),
        partial.join(ModelWriter::shard_name(2, 5)),
    )
    .expect("it is copied");

    put(&good);
    let told = std::sync::Mutex::new((Vec::new(), Vec::new()));
    let report = convert_dense_model(&source, &out, &options, &|progress| {
        let mut told = told.lock().expect("no thread has panicked");
        match progress {
            Progress::Notice(text) => told.0.push(text.to_owned()),
            Progress::Written { finished, of } => told.1.push((finished, of)),
            Progress::Layer { .. } => {}
        }
    })
    .expect("it goes on");
    let (notices, finished) = told.into_inner().expect("no thread has panicked");
    assert!(
        notices.len() == 1 && notices[0].contains("going on"),
        "{notices:?}"
    );
    assert_eq!(finished, [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]);
    assert_eq!(
        (report.run.files_written, report.run.files_of_earlier_runs),
        (4, 1)
    );
    assert_eq!(written(&out, 0), times[0], "layer 0 was written again");
    assert!(
        result(&out) == result(&whole),
        "an interrupted conversion gives another result"
    );
}

#[test]
fn a_source_that_was_changed_is_converted_anew() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = folder.path().join("dense.gguf");
    let mut nan = matrices(1)[1].to_f32();
    nan[0] = f32::NAN;
    let nan = Tensor::f32([NEURONS, HIDDEN], nan).expect("the shape fits");
    write_gguf(&gguf, &[("blk.1.ffn_up.weight".to_owned(), nan)]);
    let out = folder.path().join("out");
    let options = options(MoeLayout::Mixtral);
    convert_dense_model(&gguf, &out, &options, &|_| {}).expect_err("a NaN in layer 1");
    // Layer 0 is another now too.
    let other = Tensor::f32([NEURONS, HIDDEN], vec![0.25; NEURONS * HIDDEN]);
    write_gguf(
        &gguf,
        &[(
            "blk.0.ffn_up.weight".to_owned(),
            other.expect("the shape fits"),
        )],
    );
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
    let file = std::fs::File::options().write(true).open(&gguf);
    file.expect("it is there")
        .set_modified(later)
        .expect("a time");
    let report = convert_dense_model(&gguf, &out, &options, &|_| {}).expect("it converts");
    assert_eq!(
        (report.run.files_written, report.run.files_of_earlier_runs),
        (3, 0)
    );
    let model = MoeModel::open(&out).expect("the family reader opens it");
    let up = model.experts(&model.layers()[0]).expect("it is read").up;
    assert!(up.to_f32().iter().all(|&x| x == 0.25));
}
