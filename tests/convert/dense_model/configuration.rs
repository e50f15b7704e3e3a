//! What is written into config.json, and what is warned of.

use rankmix::convert::{DenseModelOptions, convert_dense_model};
use rankmix::formats::{Dtype, MoeLayout};
use serde_json::{Value, json};

use super::{config, options, tensors_of, write_model, zeros};

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
