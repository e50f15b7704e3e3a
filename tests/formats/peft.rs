use std::fs;
use std::path::Path;

use rankmix::formats::{
    ExpertOrientation, FusedExperts, LoraConfig, LoraPair, PeftAdapter, Target, TensorFile,
};
use rankmix::layers::{Linear, Lora};
use rankmix::{Device, Error, Graph, ParameterStore, Tensor, TensorData, TensorType};

/// Numbers around 0 that are all different.
fn floats(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| ((i + 31 * seed) as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

fn config(json: &str) -> rankmix::Result<LoraConfig> {
    LoraConfig::from_json(json, "adapter_config.json")
}

fn linear(rank: usize, d_in: usize, d_out: usize, scale: f64, seed: usize) -> LoraPair {
    LoraPair {
        target: Target::Linear,
        a: floats(&[rank, d_in], seed),
        b: floats(&[d_out, rank], seed + 1),
        bias: None,
        scale,
    }
}

/// An adapter with everything: mixed ranks and alphas, an embedding, a bias of B, a module saved whole.
fn adapter() -> PeftAdapter {
    let json = r#"{
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": true, "lora_bias": true, "bias": "none",
        "rank_pattern": {"v_proj": 2, "layers\\.1\\..*": 3}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5.5},
        "target_modules": ["q_proj", "v_proj", "embed_tokens"], "base_model_name_or_path": "some/model", "its_own_key": [1, 2]
    }"#;
    let config = config(json).expect("a sound configuration");
    let mut pairs = std::collections::BTreeMap::new();
    let mut add = |layer: &str, mut pair: LoraPair| {
        pair.scale = config.scale_of(layer).expect("sound patterns");
        pairs.insert(layer.to_owned(), pair);
    };
    let mut with_bias = linear(4, 6, 5, 0.0, 1);
    with_bias.bias = Some(floats(&[5], 9));
    add("model.layers.0.self_attn.q_proj", with_bias);
    add("model.layers.0.self_attn.v_proj", linear(2, 6, 3, 0.0, 3));
    add("model.layers.1.self_attn.v_proj", linear(2, 6, 3, 0.0, 5));
    add("model.layers.1.self_attn.q_proj", linear(3, 6, 5, 0.0, 7));
    let mut embedding = linear(4, 11, 6, 0.0, 11);
    embedding.target = Target::Embedding;
    add("model.embed_tokens", embedding);
    let others = [(
        "base_model.model.score.weight".to_owned(),
        floats(&[2, 6], 13),
    )];
    PeftAdapter {
        config,
        pairs,
        others: others.into(),
    }
}

#[test]
fn patterns_and_scales_are_those_of_peft() {
    let adapter = adapter();
    let of = |layer: &str| {
        let config = &adapter.config;
        (
            config.rank_of(layer).expect("sound patterns"),
            config.alpha_of(layer).expect("sound patterns"),
        )
    };
    // By the end of the name; the first pattern that matches; a whole part of it.
    assert_eq!(of("model.layers.0.self_attn.q_proj"), (4, 8.0));
    assert_eq!(of("model.layers.0.self_attn.v_proj"), (2, 5.5));
    assert_eq!(of("model.layers.1.self_attn.v_proj"), (2, 8.0));
    assert_eq!(of("model.layers.1.self_attn.q_proj"), (3, 8.0));
    assert_eq!(of("model.layers.0.self_attn.my_v_proj"), (4, 8.0));
    assert_eq!(of("v_proj"), (2, 8.0));
    let scale = adapter.config.scale_of("model.layers.0.self_attn.q_proj");
    assert_eq!(scale.expect("sound patterns"), 8.0 / 2.0);
    let plain = config(r#"{"peft_type": "LORA"}"#).expect("only peft_type is mandatory");
    assert_eq!(
        (plain.rank, plain.scale_of("x").expect("no pattern")),
        (8, 1.0)
    );
    assert_eq!(adapter.config.unknown_keys(), ["its_own_key"]);
}

#[test]
fn a_folder_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let adapter = adapter();
    adapter
        .write(folder.path())
        .expect("a folder that can be written to");
    let read = PeftAdapter::read(folder.path()).expect("the folder just written");
    assert_eq!(read, adapter);
    let names: Vec<String> = TensorFile::read(folder.path().join("adapter_model.safetensors"))
        .expect("the file just written")
        .tensors
        .into_keys()
        .collect();
    for name in [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.score.weight",
    ] {
        assert!(
            names.iter().any(|other| other == name),
            "{name} is not among {names:?}"
        );
    }
    // Again, over what is there: the same bytes.
    let bytes = |name: &str| fs::read(folder.path().join(name)).expect("a file just written");
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    let before = files.map(bytes);
    read.write(folder.path())
        .expect("a folder that can be written to");
    assert!(
        files.map(bytes) == before,
        "a second round changes the files"
    );
}

#[test]
fn a_merged_weight_computes_what_the_layer_does() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let layer = "model.layers.0.self_attn.q_proj";
    let adapter = PeftAdapter {
        config: config(r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6}"#).expect("sound"),
        pairs: [(layer.to_owned(), linear(4, 6, 5, 1.5, 1))].into(),
        others: std::collections::BTreeMap::new(),
    };
    adapter
        .write(folder.path())
        .expect("a folder that can be written to");
    let adapter = PeftAdapter::read(folder.path()).expect("the folder just written");
    let pair = &adapter.pairs[layer];
    let weight = floats(&[5, 6], 20);

    let mut graph = Graph::new();
    let x = graph
        .input("x", TensorType::f32([3, 6]))
        .expect("a name of its own");
    let lora = Lora::new(Linear::new(layer, 6, 5), pair.options()).expect("a sound layer");
    let adapted = lora.forward(&mut graph, x).expect("shapes that fit");
    let merged = graph
        .parameter("merged", [5, 6], rankmix::Init::Zeros, false)
        .expect("a name of its own");
    let plain = graph.matmul_nt(x, merged).expect("shapes that fit");
    for value in [adapted, plain] {
        graph.output(value).expect("a value of this graph");
    }
    let store = ParameterStore::new(&Device::cpu());
    store
        .insert(&format!("{layer}.weight"), &weight)
        .expect("memory for it");
    adapter.load_into(&store).expect("memory for it");
    let whole = adapter
        .merged(layer, &weight)
        .expect("shapes that fit")
        .expect("a layer that is adapted");
    store.insert("merged", &whole).expect("memory for it");
    let mut session = graph.compile(&store).expect("a sound graph");
    session
        .set("x", &floats(&[3, 6], 30))
        .expect("an input of the graph");
    let outputs = session.run_reading(&[adapted, plain]).expect("a CPU");
    let [one, other] = [0, 1].map(|which| outputs[which].to_f32());
    for (x, y) in one.iter().zip(&other) {
        assert!((x - y).abs() < 1e-5, "{x} from the adapter, {y} merged");
    }
    assert_ne!(whole, weight, "merging did nothing");
    let back = pair.unmerge(&whole, false).expect("shapes that fit");
    for (x, y) in back.to_f32().iter().zip(weight.to_f32()) {
        assert!(
            (x - y).abs() < 1e-6,
            "{x} after unmerging, {y} before merging"
        );
    }
    // The transposed weight, merged as such.
    let transpose = |tensor: &Tensor| {
        let (rows, columns) = (tensor.shape().dims()[0], tensor.shape().last());
        let data = tensor.to_f32();
        let moved = (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c));
        Tensor::f32([columns, rows], moved.map(|at| data[at]).collect()).expect("as many")
    };
    let turned = pair
        .merge(&transpose(&weight), true)
        .expect("shapes that fit");
    for (x, y) in turned.to_f32().iter().zip(transpose(&whole).to_f32()) {
        assert!((x - y).abs() < 1e-6, "{x} merged transposed, {y} merged");
    }
    let error = pair
        .merge(&floats(&[6, 5], 1), false)
        .expect_err("shapes that do not fit");
    assert!(
        error.to_string().contains("[6, 5]") && error.to_string().contains("[5, 6]"),
        "{error}"
    );
}

#[test]
fn fused_experts_are_taken_apart_in_both_orientations() {
    let [experts, middle, last, rank] = [3, 4, 5, 2];
    let weights = floats(&[experts, middle, last], 3);
    for (d_in, d_out, orientation) in [
        (last, middle, ExpertOrientation::LastIsInput),
        (middle, last, ExpertOrientation::MiddleIsInput),
    ] {
        let pair = LoraPair {
            scale: 0.5,
            ..linear(experts * rank, d_in, d_out, 0.0, 8)
        };
        let fused = FusedExperts::of_pair(&pair, [experts, middle, last]).expect("shapes that fit");
        assert_eq!(fused.orientation, orientation);
        assert_eq!(fused.to_pair().expect("experts that are alike"), pair);
        let merged = fused.merge(&weights).expect("shapes that fit").to_f32();
        let (a, b, before) = (pair.a.to_f32(), pair.b.to_f32(), weights.to_f32());
        // By the formula: row e rank + j of A, column j experts + e of B.
        for e in 0..experts {
            for m in 0..middle {
                for l in 0..last {
                    let (o, i) = match orientation {
                        ExpertOrientation::LastIsInput => (m, l),
                        ExpertOrientation::MiddleIsInput => (l, m),
                    };
                    let change: f32 = (0..rank)
                        .map(|j| {
                            b[o * rank * experts + j * experts + e] * a[(e * rank + j) * d_in + i]
                        })
                        .sum();
                    let at = (e * middle + m) * last + l;
                    let expected = before[at] + 0.5 * change;
                    assert!(
                        (merged[at] - expected).abs() < 1e-5,
                        "{} at {e}, {m}, {l}: {expected}",
                        merged[at]
                    );
                }
            }
        }
        let merged = fused.merge(&weights).expect("shapes that fit");
        let back = fused.unmerge(&merged).expect("shapes that fit").to_f32();
        assert!(back.iter().zip(&before).all(|(x, y)| (x - y).abs() < 1e-6));
        let error = FusedExperts::of_pair(&pair, [experts, middle, last + 1])
            .expect_err("shapes that do not fit");
        assert!(error.to_string().contains("[3, 4, 6]"), "{error}");
    }
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let with = |more: &str| config(&format!(r#"{{"peft_type": "LORA", {more}}}"#));
    assert!(
        with(r#""use_dora": false, "init_lora_weights": "gaussian", "rank_pattern": null"#).is_ok()
    );
    let nothing =
        r#""use_qalora": false, "arrow_config": null, "layer_replication": null, "use_bdlora": []"#;
    let nothing = with(nothing).expect("keys that say nothing");
    assert!(nothing.unknown_keys().is_empty());
    for (more, words) in [
        (r#""r": 0"#, ["r is 0", "from 1"]),
        (r#""r": -4"#, ["r is -4", "whole number"]),
        (r#""r": 99999999999"#, ["99999999999", "1048576"]),
        (r#""lora_alpha": "8""#, ["lora_alpha", "finite number"]),
        (r#""use_rslora": 1"#, ["use_rslora", "true or false"]),
        (r#""rank_pattern": {"q": 0}"#, ["rank_pattern of q", "0"]),
        (r#""rank_pattern": [1]"#, ["rank_pattern", "object"]),
        (r#""alpha_pattern": {"(": 1}"#, ["pattern `(`", "regex"]),
        (r#""bias": "some""#, ["bias", "lora_only"]),
        (r#""use_dora": true"#, ["use_dora", "DoRA"]),
        (
            r#""init_lora_weights": "pissa_niter_4""#,
            ["pissa", "changed"],
        ),
        (r#""init_lora_weights": "olora""#, ["olora", "changed"]),
        (r#""init_lora_weights": "corda""#, ["corda", "changed"]),
        (r#""init_lora_weights": "lora_ga""#, ["lora_ga", "changed"]),
        (r#""use_qalora": true"#, ["use_qalora", "not compute"]),
        (r#""use_bdlora": true"#, ["use_bdlora", "block-diagonal"]),
        (r#""arrow_config": {"top_k": 3}"#, ["arrow_config", "3"]),
        (
            r#""layer_replication": [[0, 4], [2, 5]]"#,
            ["layer_replication", "[[0,4],[2,5]]"],
        ),
        (
            r#""alora_invocation_tokens": [7]"#,
            ["alora_invocation_tokens", "[7]"],
        ),
    ] {
        assert_damaged!(with(more), words[0], words[1]);
    }
    assert_damaged!(config("{}"), "no peft_type");
    assert_damaged!(config(r#"{"peft_type": "IA3"}"#), "IA3");
    assert_damaged!(config("[]"), "invalid type: sequence");
    assert_damaged!(config(r#"{"peft_type": "#), "line 1");
}

#[test]
fn what_would_be_read_otherwise_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    adapter().write(folder.path()).expect("a sound adapter");
    let refused = |change: &dyn Fn(&mut PeftAdapter), words: [&str; 2]| {
        let mut changed = adapter();
        change(&mut changed);
        let error = changed.write(folder.path()).expect_err(words[0]);
        assert!(matches!(error, Error::Setting { .. }), "{error:?}");
        let message = error.to_string();
        for word in words {
            assert!(message.contains(word), "`{message}` does not name {word}");
        }
        let kept = PeftAdapter::read(folder.path()).expect("the one before");
        assert_eq!(kept, adapter());
    };
    let with_key = |key: &'static str, value: serde_json::Value| {
        move |adapter: &mut PeftAdapter| {
            let others = &mut adapter.config.others;
            others.insert(key.to_owned(), value.clone());
        }
    };
    refused(&with_key("use_dora", true.into()), ["use_dora", "DoRA"]);
    let pissa = with_key("init_lora_weights", "pissa".into());
    refused(&pissa, ["pissa", "changed"]);
    refused(&with_key("use_qalora", true.into()), ["use_qalora", "true"]);
    refused(&with_key("r", 5.into()), ["adapter_config.json", "another"]);
    let bias = |adapter: &mut PeftAdapter| adapter.config.bias = "some".to_owned();
    refused(&bias, ["bias", "lora_only"]);
    let no_bias = |adapter: &mut PeftAdapter| adapter.config.lora_bias = false;
    refused(&no_bias, ["lora_bias", "layers.0.self_attn.q_proj"]);
    for end in [".lora_A.weight", ".lora_magnitude_vector"] {
        let name = format!("base_model.model.x{end}");
        let other = |adapter: &mut PeftAdapter| {
            _ = adapter.others.insert(name.clone(), floats(&[2, 2], 1));
        };
        refused(&other, [&name, "adapted layer"]);
    }
}

#[test]
fn a_bias_of_b_is_where_the_configuration_and_the_layer_have_it() {
    let mut pair = linear(4, 6, 5, 2.0, 1);
    pair.bias = Some(floats(&[5], 9));
    let adapter = PeftAdapter::of_pairs([("layer".to_owned(), pair)].into());
    assert!(adapter.config.lora_bias);
    let folder = tempfile::tempdir().expect("a folder of its own");
    adapter.write(folder.path()).expect("a sound adapter");
    let path = folder.path().join("adapter_config.json");
    let mut config = adapter.config.clone();
    config.lora_bias = false;
    fs::write(&path, config.to_json()).expect("a file");
    assert_damaged!(PeftAdapter::read(folder.path()), "`layer`", "lora_bias");
    let store = ParameterStore::new(&Device::cpu());
    let error = adapter.load_into(&store).expect_err("no place for a bias");
    assert!(error.to_string().contains("lora_bias = layer"), "{error}");
    assert!(store.names().is_empty());
}

/// An adapter's folder with one of its tensors changed.
fn read_changed(
    folder: &Path,
    change: impl FnOnce(&mut TensorFile),
) -> rankmix::Result<PeftAdapter> {
    adapter()
        .write(folder)
        .expect("a folder that can be written to");
    let path = folder.join("adapter_model.safetensors");
    let mut file = TensorFile::read(&path).expect("the file just written");
    change(&mut file);
    file.write(&path).expect("a folder that can be written to");
    PeftAdapter::read(folder)
}

#[test]
fn adapters_that_do_not_fit_their_configuration_are_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let read = |change: &dyn Fn(&mut TensorFile)| read_changed(folder.path(), change);
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let set =
        |file: &mut TensorFile, name: String, tensor: Tensor| _ = file.tensors.insert(name, tensor);
    assert_damaged!(
        read(&|file| _ = file.tensors.remove(&format!("{q}.lora_B.weight"))),
        "layers.0.self_attn.q_proj",
        "no lora_B"
    );
    assert_damaged!(
        read(&|file| _ = file.tensors.remove(&format!("{q}.lora_A.weight"))),
        "layers.0.self_attn.q_proj",
        "no lora_A"
    );
    assert_damaged!(
        read(&|file| set(file, format!("{q}.lora_A.weight"), floats(&[3, 6], 1))),
        "q_proj",
        "different ranks"
    );
    assert_damaged!(
        read(&|file| {
            set(file, format!("{q}.lora_A.weight"), floats(&[5, 6], 1));
            set(file, format!("{q}.lora_B.weight"), floats(&[5, 5], 1));
        }),
        "q_proj",
        "rank 5",
        "says 4"
    );
    assert_damaged!(
        read(&|file| set(file, format!("{q}.lora_A.weight"), floats(&[4, 6, 1, 1], 1))),
        "q_proj",
        "convolutions"
    );
    assert_damaged!(
        read(&|file| set(file, format!("{q}.lora_B.bias"), floats(&[4], 1))),
        "q_proj",
        "bias",
        "[5]"
    );
    assert_damaged!(
        read(&|file| set(file, format!("{q}.lora_magnitude_vector"), floats(&[5], 1))),
        "magnitude",
        "DoRA"
    );
    assert_damaged!(
        read(&|file| set(file, "q_proj.lora_A.weight".to_owned(), floats(&[4, 6], 1))),
        "q_proj.lora_A.weight",
        "base_model.model."
    );
    assert_damaged!(
        read(&|file| {
            let bad = Tensor::f32([1, 2], vec![0.0, f32::NAN]).expect("two numbers");
            set(file, format!("{q}.lora_A.weight"), bad);
        }),
        "q_proj.lora_A",
        "NaN",
        "element 1"
    );
    let missing = PeftAdapter::read(folder.path().join("absent"));
    assert!(matches!(missing, Err(Error::File { .. })), "{missing:?}");
}

#[test]
fn integers_are_no_factors_and_stay_integers_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    for part in ["lora_A.weight", "lora_B.weight", "lora_B.bias"] {
        let name = format!("{q}.{part}");
        let found = read_changed(folder.path(), |file| {
            let dims = file.tensors[&name].shape().clone();
            let whole = Tensor::new(dims.clone(), TensorData::I32(vec![1; dims.elements()]));
            _ = file.tensors.insert(name.clone(), whole.expect("as many"));
        });
        assert_damaged!(found, name.as_str(), "I32");
        let mut wrong = adapter();
        let pair = wrong.pairs.get_mut("model.layers.0.self_attn.q_proj");
        let pair = pair.expect("a pair");
        let tensor = match part {
            "lora_A.weight" => &mut pair.a,
            "lora_B.weight" => &mut pair.b,
            _ => pair.bias.as_mut().expect("a bias"),
        };
        let dims = tensor.shape().clone();
        let whole = Tensor::new(dims.clone(), TensorData::I32(vec![1; dims.elements()]));
        *tensor = whole.expect("as many");
        let error = wrong
            .write(folder.path())
            .expect_err("it would not be read");
        assert!(matches!(&error, Error::TypeMismatch { name: found, .. } if *found == name));
    }
    // A type that no tensor here can have: bytes, as quantised adapters have them.
    adapter().write(folder.path()).expect("a folder of its own");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).expect("the file just written");
    let name = format!("{q}.lora_A.weight");
    let from = format!(r#""{name}":{{"dtype":"F32","shape":[4,6]"#);
    let to = format!(r#""{name}":{{"dtype":"U8","shape":[4,24]"#);
    assert_eq!(from.len(), to.len());
    let at = bytes
        .windows(from.len())
        .position(|window| window == from.as_bytes());
    let at = at.expect("a tensor of the header");
    let mut changed = bytes;
    changed[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(&path, changed).expect("a folder of its own");
    assert_damaged!(PeftAdapter::read(folder.path()), name.as_str(), "U8");

    let mut counted = adapter();
    let count = Tensor::i32([1], vec![16_777_217]).expect("one");
    let name = "base_model.model.score.count".to_owned();
    counted.others.insert(name, count);
    counted.write(folder.path()).expect("a folder of its own");
    let read = PeftAdapter::read(folder.path()).expect("the folder just written");
    assert_eq!(read, counted, "2^24 + 1 is no float of 32 bits");
}

#[test]
fn pairs_that_could_not_be_read_are_not_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("out");
    let q = "model.layers.0.self_attn.q_proj";
    let refused = |change: &dyn Fn(&mut LoraPair), word: &str| {
        let mut wrong = adapter();
        change(wrong.pairs.get_mut(q).expect("a pair"));
        let error = wrong.write(&path).expect_err("this must be refused");
        let message = error.to_string();
        assert!(message.contains(word) && message.contains(q), "{message}");
        assert!(!path.exists(), "a folder was made for it");
    };
    refused(&|pair| pair.a = floats(&[3, 6], 1), "different ranks");
    refused(&|pair| pair.a = floats(&[4, 6, 1], 1), "no matrices");
    refused(&|pair| pair.bias = Some(floats(&[4], 1)), "expected [5]");
    let with = |odd: f64| {
        let mut all = vec![0.5; 24];
        all[7] = odd;
        Tensor::f64([4, 6], all).expect("24 numbers")
    };
    refused(&|pair| pair.a = with(f64::NAN), "element 7");
    // Finite in 64 bits, infinite in the 32 of the file.
    refused(&|pair| pair.a = with(1e300), "element 7");
}

#[test]
fn what_peft_would_read_differently_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("out");
    let mut wrong = adapter();
    wrong
        .pairs
        .insert("other".to_owned(), linear(7, 6, 5, 4.0, 1));
    let error = wrong.write(&path).expect_err("another rank");
    assert!(error.to_string().contains("`other` has rank 7"), "{error}");
    wrong
        .pairs
        .insert("other".to_owned(), linear(4, 6, 5, 4.5, 1));
    let error = wrong.write(&path).expect_err("another scale");
    assert!(error.to_string().contains("`other` has 4.5"), "{error}");
    assert!(
        !path.exists(),
        "a folder was made for what cannot be written"
    );
}
