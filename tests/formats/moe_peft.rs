//! MixLoRA and MoLA as MoE-PEFT names their tensors.

use std::fs;
use std::path::Path;

use rankmix::formats::{Adapter, MixtureAdapter, MoePeftAdapter, PeftAdapter, TensorFile};
use rankmix::ops::BalanceForm;
use rankmix::{Device, Error, ParameterStore, Tensor};

fn floats(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| ((i + 31 * seed) as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

const MIX_LORA: &str = r#"{
    "peft_type": "MIXLORA", "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model",
    "r": 2, "lora_alpha": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "expert_lora": {"r": 3, "lora_alpha": 6, "bias": "none", "lora_dropout": 0.1},
    "routing_strategy": "mixlora", "num_experts": 4, "top_k": 2
}"#;

const MOLA: &str = r#"{
    "peft_type": "MOLA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"],
    "routing_strategy": "mola", "num_experts": 4, "top_k": 3
}"#;

/// A layer of width 8 with a feed-forward part of width 12.
fn mix_lora() -> TensorFile {
    let mut file = TensorFile::default();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = floats(shape, file.tensors.len());
        _ = file.tensors.insert(name, tensor);
    };
    for layer in 0..2 {
        let layer = format!("mixlora.layers.{layer}");
        add(format!("{layer}.self_attn.q_proj.lora_A.weight"), &[2, 8]);
        add(format!("{layer}.self_attn.q_proj.lora_B.weight"), &[8, 2]);
        add(format!("{layer}.mlp.moe_gate.weight"), &[4, 8]);
        for (linear, d_in, d_out) in [
            ("gate_proj", 8, 12),
            ("up_proj", 8, 12),
            ("down_proj", 12, 8),
        ] {
            for expert in 0..4 {
                let expert = format!("{layer}.mlp.{linear}.experts.{expert}");
                add(format!("{expert}.lora_A.weight"), &[3, d_in]);
                add(format!("{expert}.lora_B.weight"), &[d_out, 3]);
            }
        }
    }
    file
}

fn mola() -> TensorFile {
    let mut file = TensorFile::default();
    for (linear, d_in, d_out) in [("self_attn.q_proj", 8, 8), ("mlp.down_proj", 12, 8)] {
        let linear = format!("mola.layers.0.{linear}");
        let seed = file.tensors.len();
        let mut add = |name: String, shape: &[usize], seed| {
            _ = file.tensors.insert(name, floats(shape, seed));
        };
        add(format!("{linear}.moe_gate.weight"), &[4, d_in], seed);
        for expert in 0..4 {
            add(
                format!("{linear}.experts.{expert}.lora_A.weight"),
                &[3, d_in],
                seed + 2 * expert,
            );
            add(
                format!("{linear}.experts.{expert}.lora_B.weight"),
                &[d_out, 3],
                seed + 2 * expert + 1,
            );
        }
    }
    file
}

fn read(folder: &Path, config: &str, file: &TensorFile) -> rankmix::Result<MoePeftAdapter> {
    fs::write(folder.join("adapter_config.json"), config).expect("a folder of its own");
    file.write(folder.join("adapter_model.safetensors"))
        .expect("a folder of its own");
    MoePeftAdapter::read(folder)
}

#[test]
fn one_gate_of_mixlora_stands_beside_every_linear_layer_that_it_serves() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let file = mix_lora();
    let adapter = read(folder.path(), MIX_LORA, &file).expect("a sound adapter");
    let MoePeftAdapter { mixture, plain, .. } = &adapter;
    assert_eq!(mixture.layers.len(), 6);
    let gate = &file.tensors["mixlora.layers.1.mlp.moe_gate.weight"];
    for linear in ["gate_proj", "up_proj", "down_proj"] {
        let path = format!("model.layers.1.mlp.{linear}");
        assert_eq!(&mixture.tensors[&format!("{path}.router")], gate);
        assert_eq!(mixture.blocks[&path], "model.layers.1.mlp");
        let layer = &mixture.layers[&path];
        assert_eq!((layer.options().rank, layer.options().alpha), (3, 6.0));
        assert_eq!(layer.options().dropout, 0.1);
        let routing = layer.routing().expect("a gate");
        assert_eq!(
            (routing.experts, routing.top_k, routing.renormalize),
            (4, 2, true)
        );
        assert_eq!(routing.balance, BalanceForm::HuggingFace);
        let a = mixture.tensors[&format!("{path}.lora_a")].to_f32();
        let third = format!("mixlora.layers.1.mlp.{linear}.experts.2.lora_A.weight");
        let third = file.tensors[&third].to_f32();
        assert_eq!(a[2 * third.len()..3 * third.len()], third);
    }
    let pair = &plain.pairs["model.layers.0.self_attn.q_proj"];
    assert_eq!((pair.rank(), pair.scale), (2, 2.0));
    assert_eq!(
        pair.b,
        file.tensors["mixlora.layers.0.self_attn.q_proj.lora_B.weight"]
    );
    let any = Adapter::read(folder.path()).expect("the same folder");
    assert_eq!(any, Adapter::MoePeft(adapter.clone()));

    // Nothing here computes it, so it is not put where a layer would find it; but it goes through our layout.
    let store = ParameterStore::new(&Device::cpu());
    let error = mixture
        .load_into(&store)
        .expect_err("a gate for a whole block");
    assert!(error.to_string().contains("model.layers.0.mlp"), "{error}");
    assert!(store.names().is_empty());
    let ours = folder.path().join("ours");
    mixture.write(&ours).expect("a folder of its own");
    assert_eq!(&MixtureAdapter::read(&ours).expect("just written"), mixture);

    // One expert with the attention's pairs is a plain LoRA of PEFT.
    let expert = adapter.expert(3).expect("one of four");
    assert_eq!(expert.pairs.len(), 8);
    let peft = folder.path().join("peft");
    expert
        .write(&peft)
        .expect("ranks and scales as the patterns say");
    let expert = PeftAdapter::read(&peft).expect("just written");
    let down = &expert.pairs["model.layers.1.mlp.down_proj"];
    assert_eq!(
        down.a,
        file.tensors["mixlora.layers.1.mlp.down_proj.experts.3.lora_A.weight"]
    );
    assert_eq!((down.rank(), down.scale), (3, 2.0));
}

#[test]
fn mola_has_a_gate_for_each_linear_layer() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let file = mola();
    let adapter = read(folder.path(), MOLA, &file).expect("a sound adapter");
    assert!(adapter.plain.pairs.is_empty() && adapter.mixture.blocks.is_empty());
    let store = ParameterStore::new(&Device::cpu());
    adapter
        .mixture
        .load_into(&store)
        .expect("what MoeLora computes");
    let router = store
        .read("model.layers.0.mlp.down_proj.router")
        .expect("a parameter");
    assert_eq!(
        router,
        file.tensors["mola.layers.0.mlp.down_proj.moe_gate.weight"]
    );
    let routing = adapter.mixture.layers["model.layers.0.self_attn.q_proj"].routing();
    assert_eq!(routing.expect("a gate").top_k, 3);
}

#[test]
fn what_is_damaged_or_cannot_be_computed_is_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let config = |from: &str, to: &str| {
        assert!(MIX_LORA.contains(from), "{from}");
        read(folder.path(), &MIX_LORA.replacen(from, to, 1), &mix_lora())
    };
    assert_damaged!(
        config("\"mixlora\"", "\"mixlora-dynamic\""),
        "routing_strategy",
        "mixlora-dynamic"
    );
    assert_damaged!(
        config("\"mixlora\"", "\"mixlora-switch\""),
        "routing_strategy",
        "mixlora-switch"
    );
    assert_damaged!(config("\"MIXLORA\"", "\"LORAMOE\""), "LORAMOE");
    assert_damaged!(config("\"r\": 3", "\"use_dora\": true"), "DoRA");
    assert_damaged!(config("\"r\": 3", "\"r\": 4"), "down_proj", "[3, 12]");
    assert_damaged!(config("\"r\": 2", "\"r\": 5"), "q_proj", "rank 2", "5");
    assert_damaged!(config("\"r\": 2", "\"r\": 1e300"), "r is");
    assert_damaged!(
        config("\"num_experts\": 4", "\"num_experts\": 1000000000000"),
        "num_experts"
    );
    assert_damaged!(
        config("\"num_experts\": 4", "\"num_experts\": 3"),
        "moe_gate",
        "[3, 8]"
    );
    assert_damaged!(
        config("\"num_experts\": 4", "\"num_experts\": 5"),
        "experts.4",
        "missing"
    );
    assert_damaged!(config("\"top_k\": 2", "\"top_k\": 5"), "top_k");
    assert_damaged!(
        config("\"lora_alpha\": 4", "\"lora_alpha\": null"),
        "lora_alpha"
    );
    assert_damaged!(config("{\"r\": 3", "[{\"r\": 3").map(|_| ()), "line");
    let tensors = |change: &dyn Fn(&mut TensorFile)| {
        let mut file = mix_lora();
        change(&mut file);
        read(folder.path(), MIX_LORA, &file)
    };
    let down = "mixlora.layers.1.mlp.down_proj";
    let remove = |name: String| tensors(&|file| _ = file.tensors.remove(&name));
    assert_damaged!(
        remove(format!("{down}.experts.2.lora_B.weight")),
        "experts.2.lora_B",
        "missing"
    );
    assert_damaged!(
        remove("mixlora.layers.1.mlp.moe_gate.weight".to_owned()),
        "layers.1.mlp.moe_gate",
        "missing"
    );
    let q = "mixlora.layers.0.self_attn.q_proj";
    assert_damaged!(remove(format!("{q}.lora_A.weight")), "q_proj", "no lora_A");
    let set = |name: String, dims: &[usize]| {
        tensors(&|file| _ = file.tensors.insert(name.clone(), floats(dims, 1)))
    };
    assert_damaged!(
        set(format!("{down}.experts.1.lora_A.weight"), &[3, 8]),
        "experts.1.lora_A",
        "[3, 12]"
    );
    assert_damaged!(
        set(format!("{down}.experts.9.lora_A.weight"), &[3, 12]),
        "experts.9.lora_A"
    );
    assert_damaged!(
        set("mixlora.layers.7.mlp.moe_gate.weight".to_owned(), &[4, 8]),
        "layers.7"
    );
    assert_damaged!(
        set("classifier".to_owned(), &[4, 8]),
        "classifier",
        "mixlora."
    );
    assert_damaged!(
        set("mixlora.layers.0.mlp.odd".to_owned(), &[4, 8]),
        "mlp.odd"
    );
    assert_damaged!(
        set("mixlora...lora_A.weight".to_owned(), &[4, 8]),
        "names with dots"
    );
    let nan = Tensor::f32([4, 8], vec![f32::NAN; 32]).expect("32 numbers");
    assert_damaged!(
        tensors(&|file| _ = file.tensors.insert(
            "mixlora.layers.0.mlp.moe_gate.weight".to_owned(),
            nan.clone()
        )),
        "moe_gate",
        "NaN"
    );
    fs::remove_file(folder.path().join("adapter_model.safetensors")).expect("a file");
    assert!(matches!(
        MoePeftAdapter::read(folder.path()),
        Err(Error::File { .. })
    ));
    fs::write(folder.path().join("adapter_model.bin"), b"").expect("a folder");
    assert_damaged!(MoePeftAdapter::read(folder.path()), "pickle");
}

fn with_keys(config: &str, more: &str) -> String {
    config.replacen('{', &format!("{{ {more},"), 1)
}

#[test]
fn keys_that_change_the_computation_are_read_or_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let mix = |more: &str| read(folder.path(), &with_keys(MIX_LORA, more), &mix_lora());
    for (more, words) in [
        (r#""act_fn": "silu""#, ["act_fn", "silu"]),
        (r#""jitter_noise": 1.5"#, ["jitter_noise", "1.5"]),
        (r#""jitter_noise": -0.1"#, ["jitter_noise", "-0.1"]),
        (r#""jitter_noise": "some""#, ["jitter_noise", "some"]),
        (r#""lora_bias": true"#, ["lora_bias", "true"]),
        (r#""fan_in_fan_out": true"#, ["fan_in_fan_out", "true"]),
        (r#""rank_pattern": {"q": 4}"#, ["rank_pattern", "4"]),
        (r#""alpha_pattern": {"q": 4}"#, ["alpha_pattern", "4"]),
        (
            r#""modules_to_save": ["head"]"#,
            ["modules_to_save", "head"],
        ),
        (r#""init_lora_weights": "pissa""#, ["pissa", "changed"]),
        (r#""rotation": "planes""#, ["rotation", "planes"]),
    ] {
        assert_damaged!(mix(more), words[0], words[1]);
    }
    let nested = |more: &str| {
        let config = MIX_LORA.replacen("{\"r\": 3", &format!("{{{more}, \"r\": 3"), 1);
        read(folder.path(), &config, &mix_lora())
    };
    assert_damaged!(nested(r#""act_fn": "gelu""#), "act_fn", "gelu");
    let biased = MIX_LORA.replacen("\"none\"", "\"all\"", 1);
    assert_damaged!(read(folder.path(), &biased, &mix_lora()), "bias", "all");
    let noisy = with_keys(MOLA, r#""jitter_noise": 0.1"#);
    assert_damaged!(read(folder.path(), &noisy, &mola()), "jitter_noise", "0.1");

    // What changes nothing where it is so.
    let neutral = r#""act_fn": null, "lora_bias": false, "rank_pattern": {}, "modules_to_save": null, "jitter_noise": null"#;
    assert_eq!(
        mix(neutral).expect("the same").mixture.layers,
        mix(r#""bias": "none""#)
            .expect("a sound adapter")
            .mixture
            .layers
    );
    let noisy = mix(r#""jitter_noise": 0.01"#).expect("noise of the router");
    for layer in noisy.mixture.layers.values() {
        assert_eq!(layer.routing().expect("a gate").jitter, 0.01);
    }
    // What nobody knows is kept and shown; what says how it was trained is kept.
    let kept = mix(r#""its_own_key": [1, 2], "router_aux_loss_coef": 0.01"#).expect("sound");
    assert_eq!(kept.mixture.unknown_keys(), ["its_own_key"]);
    assert_eq!(kept.mixture.others["router_aux_loss_coef"], 0.01);
    let ours = folder.path().join("ours");
    kept.mixture.write(&ours).expect("a folder of its own");
    let again = MixtureAdapter::read(&ours).expect("just written");
    assert_eq!(again, kept.mixture);
    // PEFT refuses or warns of keys that it does not have, and finds the modules by the paths of the pairs.
    let lora = kept.expert(0).expect("one of four");
    let keys: Vec<&String> = lora.config.others.keys().collect();
    assert_eq!(
        keys,
        ["target_modules", "task_type", "base_model_name_or_path"]
    );
    assert_eq!(
        lora.config.others["target_modules"]
            .as_array()
            .map(Vec::len),
        Some(8)
    );
    let nested = nested(r#""its_own_key": 7"#).expect("sound");
    assert_eq!(nested.mixture.others["expert_lora"]["its_own_key"], 7);
    assert_eq!(nested.mixture.unknown_keys(), ["expert_lora"]);
}

#[test]
fn alphas_keep_their_digits() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let config = MIX_LORA
        .replacen(
            "\"lora_alpha\": 4",
            "\"lora_alpha\": 0.30000000000000004",
            1,
        )
        .replacen("\"lora_alpha\": 6", "\"lora_alpha\": 0.1", 1);
    let adapter = read(folder.path(), &config, &mix_lora()).expect("a sound adapter");
    let pair = &adapter.plain.pairs["model.layers.0.self_attn.q_proj"];
    assert_eq!(pair.scale, 0.30000000000000004 / 2.0);
    let mut expert = adapter.expert(1).expect("one of four");
    let down = "model.layers.1.mlp.down_proj";
    assert_eq!(expert.pairs[down].scale, 0.1 / 3.0);
    let peft = folder.path().join("peft");
    expert.write(&peft).expect("scales as the patterns say");
    let read = PeftAdapter::read(&peft).expect("just written");
    for (path, pair) in &mut expert.pairs {
        let found = read.pairs[path].scale;
        assert!(
            (found - pair.scale).abs() <= f64::EPSILON * pair.scale,
            "{path}: {found}"
        );
    }
}

#[test]
fn integers_are_no_matrices_of_experts() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    for name in [
        "mixlora.layers.1.mlp.down_proj.experts.2.lora_B.weight",
        "mixlora.layers.0.self_attn.q_proj.lora_A.weight",
        "mixlora.layers.0.mlp.moe_gate.weight",
    ] {
        let mut file = mix_lora();
        let dims = file.tensors[name].shape().clone();
        let count = dims.elements();
        let whole = Tensor::i32(dims, vec![1; count]).expect("as many");
        file.tensors.insert(name.to_owned(), whole);
        assert_damaged!(read(folder.path(), MIX_LORA, &file), name, "I32");
    }
}

/// The file with the names of the first releases: no `mlp`, the expert before the linear layer.
fn early(file: &TensorFile, linears: [&str; 3]) -> TensorFile {
    let mut early = TensorFile::default();
    for (name, tensor) in &file.tensors {
        let mut name = name.replace(".mlp.moe_gate.", ".gate.");
        for (today, then) in ["gate_proj", "up_proj", "down_proj"]
            .into_iter()
            .zip(linears)
        {
            for expert in 0..4 {
                name = name.replace(
                    &format!(".mlp.{today}.experts.{expert}."),
                    &format!(".experts.{expert}.{then}."),
                );
            }
        }
        _ = early.tensors.insert(name, tensor.clone());
    }
    early
}

#[test]
fn the_names_of_the_first_releases_are_read_too() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let today = mix_lora();
    let expected = read(folder.path(), MIX_LORA, &today).expect("a sound adapter");
    let config = MIX_LORA.replacen("\"mixlora\"", "\"mixtral\"", 1);
    for linears in [
        ["w1_proj", "w3_proj", "w2_proj"],
        ["gate_proj", "up_proj", "down_proj"],
    ] {
        let then = early(&today, linears);
        let gate = "mixlora.layers.1.gate.weight";
        assert!(then.tensors.contains_key(gate));
        let found = read(folder.path(), &config, &then).expect("a sound adapter");
        assert_eq!(found, expected);
        // Messages are in the names of the file.
        let mut missing = then.clone();
        missing.tensors.insert(gate.to_owned(), floats(&[3, 8], 1));
        assert_damaged!(read(folder.path(), &config, &missing), gate, "[3, 8]");
    }
    // The gate alone, as some releases between the two may have it; both gates at once.
    let mut gates = today.clone();
    for layer in 0..2 {
        let name = format!("mixlora.layers.{layer}.mlp.moe_gate.weight");
        let gate = gates.tensors.remove(&name).expect("a gate");
        let early = format!("mixlora.layers.{layer}.gate.weight");
        gates.tensors.insert(early, gate);
    }
    let found = read(folder.path(), &config, &gates).expect("a sound adapter");
    assert_eq!(found, expected);
    let mut both = today;
    let early = "mixlora.layers.1.gate.weight";
    both.tensors.insert(early.to_owned(), floats(&[4, 8], 1));
    assert_damaged!(read(folder.path(), &config, &both), early, "moe_gate");
}

#[test]
fn an_expert_of_none_is_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let mut attention = mix_lora();
    attention
        .tensors
        .retain(|name, _| name.contains("self_attn"));
    let adapter = read(folder.path(), MIX_LORA, &attention).expect("plain pairs alone");
    assert_eq!(adapter.plain.pairs.len(), 2);
    let error = adapter.expert(999).expect_err("there is none");
    let message = error.to_string();
    assert!(
        message.contains("999") && message.contains("0 experts"),
        "{message}"
    );
    let whole = read(folder.path(), MIX_LORA, &mix_lora()).expect("a sound adapter");
    let message = whole.expert(999).expect_err("of four").to_string();
    assert!(
        message.contains("999") && message.contains("has 4 experts"),
        "{message}"
    );
}
