//! Our layout for mixtures of LoRA experts, damaged.

use std::fs;
use std::path::Path;

use rankmix::formats::{Adapter, MixtureAdapter, MixtureKind, TensorFile};
use rankmix::{Error, Tensor};

use crate::mixture::{adapter, floats, layers};

/// A folder with one of its tensors, or its configuration, changed.
fn read_changed(
    folder: &Path,
    kind: MixtureKind,
    change: impl FnOnce(&mut TensorFile),
    config: impl FnOnce(String) -> String,
) -> rankmix::Result<MixtureAdapter> {
    adapter(kind)
        .write(folder)
        .expect("a folder that can be written to");
    let path = folder.join("adapter_model.safetensors");
    let mut file = TensorFile::read(&path).expect("the file just written");
    change(&mut file);
    file.write(&path).expect("a folder that can be written to");
    let path = folder.join("adapter_config.json");
    let text = fs::read_to_string(&path).expect("the file just written");
    fs::write(&path, config(text)).expect("a folder that can be written to");
    MixtureAdapter::read(folder)
}

#[test]
fn damaged_tensors_are_refused_with_their_name_and_place() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let read = |change: &dyn Fn(&mut TensorFile)| {
        read_changed(folder.path(), MixtureKind::RotMole, change, |text| text)
    };
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let set = |file: &mut TensorFile, end: &str, tensor: Tensor| {
        _ = file.tensors.insert(format!("{q}.{end}"), tensor);
    };
    let remove = |end: &str| read(&|file| _ = file.tensors.remove(&format!("{q}.{end}")));
    assert_damaged!(
        remove("experts.2.lora_A.weight"),
        "q_proj.experts.2.lora_A",
        "missing"
    );
    assert_damaged!(
        remove("experts.0.lora_B.weight"),
        "q_proj.experts.0.lora_B",
        "missing"
    );
    assert_damaged!(
        remove("rotation_gate.1.weight"),
        "q_proj.rotation_gate.1",
        "missing"
    );
    assert_damaged!(remove("moe_gate.weight"), "q_proj", "no layer");
    let shape = |end: &str, dims: &[usize]| read(&|file| set(file, end, floats(dims, 1)));
    assert_damaged!(
        shape("experts.1.lora_A.weight", &[5, 10]),
        "q_proj.experts.1.lora_A.weight` at byte ",
        "[5, 10]",
        "[4, 10]"
    );
    assert_damaged!(
        shape("experts.0.lora_A.weight", &[4, 10, 1]),
        "experts.0.lora_A",
        "no matrix"
    );
    // The widths are those of the first expert.
    assert_damaged!(
        shape("experts.0.lora_B.weight", &[8, 4]),
        "experts.1.lora_B",
        "[8, 4]"
    );
    assert_damaged!(
        shape("moe_gate.weight", &[4, 10]),
        "moe_gate",
        "[4, 10]",
        "[3, 10]"
    );
    assert_damaged!(
        shape("rotation_gate.0.weight", &[2, 4]),
        "rotation_gate.0",
        "[2, 10]"
    );
    assert_damaged!(
        shape("experts.3.lora_A.weight", &[4, 10]),
        "experts.3.lora_A",
        "no layer"
    );
    assert_damaged!(
        shape("moe_gate.bias", &[3]),
        "q_proj.moe_gate.bias",
        "no layer"
    );
    assert_damaged!(
        shape("lora_A.weight", &[4, 10]),
        "q_proj.lora_A.weight",
        "no layer"
    );
    let mut bad = floats(&[4, 10], 1).to_f32();
    bad[7] = f32::NAN;
    let bad = Tensor::f32([4, 10], bad).expect("forty numbers");
    assert_damaged!(
        read(&|file| set(file, "experts.1.lora_A.weight", bad.clone())),
        "experts.1.lora_A",
        "NaN",
        "element 7"
    );
    assert_damaged!(
        read(&|file| _ = file
            .tensors
            .insert("odd.moe_gate.weight".to_owned(), floats(&[3, 10], 1))),
        "odd.moe_gate.weight",
        "base_model.model."
    );
    for path in ["../../etc/passwd", "a..b", "a\\b", "/tmp/x"] {
        let name = format!("base_model.model.{path}.moe_gate.weight");
        let result = read(&|file| _ = file.tensors.insert(name.clone(), floats(&[3, 10], 1)));
        assert_damaged!(result, "names with dots");
    }
    assert_damaged!(
        read(&|file| file.tensors.clear()),
        "layer_options",
        "k_proj"
    );
    for (key, value) in [("format", "pt"), ("format_version", "2")] {
        let result = read(&|file| _ = file.metadata.insert(key.to_owned(), value.to_owned()));
        assert_damaged!(result, key, value);
        let result = read(&|file| _ = file.metadata.remove(key));
        assert_damaged!(result, key, "missing");
    }
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).expect("the file just written");
    fs::write(&path, &bytes[..bytes.len() - 5]).expect("a folder that can be written to");
    assert_damaged!(
        MixtureAdapter::read(folder.path()),
        "ends at byte",
        format!("the file at byte {}", bytes.len() - 5).as_str()
    );
    fs::remove_file(&path).expect("a file");
    assert!(matches!(
        MixtureAdapter::read(folder.path()),
        Err(Error::File { .. })
    ));
    fs::write(folder.path().join("adapter_model.bin"), b"").expect("a folder");
    assert_damaged!(MixtureAdapter::read(folder.path()), "pickle");
}

#[test]
fn impossible_configurations_are_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let read = |kind, from: &str, to: &str| {
        read_changed(
            folder.path(),
            kind,
            |_| (),
            |text| {
                assert!(text.contains(from), "`{from}` is not in {text}");
                text.replacen(from, to, 1)
            },
        )
    };
    use MixtureKind::{CoMol, MoeLora, RotMole};
    assert_damaged!(
        read(RotMole, "\"format_version\": 1", "\"format_version\": 2"),
        "format_version",
        "2",
        "1"
    );
    assert_damaged!(
        read(
            RotMole,
            "\"format_version\": 1",
            "\"format_version\": \"1\""
        ),
        "format_version",
        "\"1\""
    );
    assert_damaged!(
        read(RotMole, "\"rankmix\"", "\"another\""),
        "another",
        "rankmix"
    );
    assert_damaged!(read(RotMole, "\"ROTMOLE\"", "\"LORA\""), "LORA", "ROTMOLE");
    assert_damaged!(read(RotMole, "\"ROTMOLE\"", "17"), "peft_type", "17");
    assert_damaged!(
        read(RotMole, "\"ROTMOLE\"", "\"MOE_LORA\""),
        "rotation",
        "MoE-LoRA"
    );
    assert_damaged!(
        read(CoMol, "\"COMOL\"", "\"MOE_LORA\""),
        "core_routing",
        "MoE-LoRA"
    );
    assert_damaged!(
        read(MoeLora, "\"MOE_LORA\"", "\"COMOL\""),
        "lora_A",
        "missing"
    );
    // Numbers that no file has: nothing is allocated by them.
    for (key, value, word) in [
        ("\"r\": 4", "\"r\": 1099511627776", "1099511627776"),
        ("\"r\": 4", "\"r\": 1048576", "[1048576, 10]"),
        ("\"r\": 4", "\"r\": 0", "rank"),
        ("\"r\": 4", "\"r\": -4", "-4"),
        ("\"r\": 4", "\"r\": 5", "the rank must be even"),
        (
            "\"r\": 4",
            "\"r\": 6",
            "[4, 10], the configuration says [6, 10]",
        ),
        ("\"r\": 4", "\"q\": 4", "`r`"),
        (
            "\"num_experts\": 3",
            "\"num_experts\": 18446744073709551615",
            "18446744073709551615",
        ),
        (
            "\"num_experts\": 3",
            "\"num_experts\": 65536",
            "[65536, 10]",
        ),
        ("\"num_experts\": 3", "\"num_experts\": 0", "experts"),
        ("\"num_experts\": 3", "\"num_experts\": 4", "moe_gate"),
        ("\"top_k\": 2", "\"top_k\": 4", "top_k"),
        ("\"top_k\": 2", "\"top_k\": 0", "top_k"),
        ("\"lora_alpha\": 6.5", "\"lora_alpha\": \"much\"", "much"),
        ("\"lora_alpha\": 6.5", "\"lora_alpha\": 1e300", "alpha"),
        ("\"lora_dropout\": 0.0", "\"lora_dropout\": 1.0", "dropout"),
        ("\"planes\"", "\"spirals\"", "spirals"),
        (
            "\"balance\": \"switch\"",
            "\"balances\": \"switch\"",
            "balances",
        ),
        (
            "\"layer_options\": {",
            "\"layer_options\": {\"absent\": {},",
            "absent",
        ),
        (
            "\"layer_options\": {",
            "\"layer_options\": 1, \"x\": {",
            "layer_options",
        ),
        (
            "\"base_bias\": true",
            "\"base_bias\": true, \"extra\": 1",
            "extra",
        ),
        ("\"base_bias\": true", "\"gate_of\": \"mlp\"", "gate_of"),
    ] {
        assert_damaged!(read(RotMole, key, value), word);
    }
    assert_damaged!(read(CoMol, "\"key.value\"", "\"../key\""), "../key");
    // Two layers that share A and disagree about its rank.
    let v_gate = "base_model.model.model.layers.0.self_attn.v_proj.moe_gate.weight";
    let disagreeing = read_changed(
        folder.path(),
        CoMol,
        |file| _ = file.tensors.insert(v_gate.to_owned(), floats(&[2, 3], 1)),
        |text| text.replacen("\"num_experts\": 2", "\"r\": 3, \"num_experts\": 2", 1),
    );
    assert_damaged!(disagreeing, "0.attention.lora_a", "[4, 10]", "[3, 10]");
    let config = folder.path().join("adapter_config.json");
    fs::write(&config, "{\"peft_type\": \"COMOL\", ").expect("a folder");
    assert_damaged!(MixtureAdapter::read(folder.path()), "line 1");
    fs::write(&config, "[]").expect("a folder");
    assert_damaged!(
        MixtureAdapter::read(folder.path()),
        "invalid type: sequence"
    );
    assert_damaged!(Adapter::read(folder.path()), "invalid type: sequence");
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("out");
    let refused = |change: &dyn Fn(&mut MixtureAdapter), word: &str| {
        let mut changed = adapter(MixtureKind::MoeLora);
        change(&mut changed);
        let error = changed.write(&path).expect_err("this must be refused");
        assert!(error.to_string().contains(word), "{error}");
        assert!(
            !path.exists(),
            "a folder was made for what cannot be written"
        );
    };
    let q = "model.layers.0.self_attn.q_proj";
    refused(
        &|adapter| _ = adapter.tensors.remove(&format!("{q}.router")),
        "q_proj.router",
    );
    refused(
        &|adapter| {
            _ = adapter
                .tensors
                .insert(format!("{q}.lora_a"), floats(&[3, 4, 9], 1));
        },
        "[3, 4, 10]",
    );
    refused(
        &|adapter| {
            _ = adapter
                .tensors
                .insert("x.lora_a".to_owned(), floats(&[1], 1));
        },
        "x.lora_a",
    );
    refused(
        &|adapter| {
            let bad = Tensor::f32([3, 10], vec![f32::INFINITY; 30]).expect("thirty numbers");
            _ = adapter.tensors.insert(format!("{q}.router"), bad);
        },
        "infinity",
    );
    refused(
        &|adapter| {
            let other = layers(MixtureKind::CoMol).remove(3);
            _ = adapter.layers.insert(other.base().name.clone(), other);
        },
        "COMOL",
    );
    refused(
        &|adapter| {
            let layer = adapter.layers.remove(q).expect("a layer");
            _ = adapter.layers.insert("another.name".to_owned(), layer);
        },
        "another.name",
    );
    refused(&|adapter| *adapter = MixtureAdapter::default(), "layers");
}
