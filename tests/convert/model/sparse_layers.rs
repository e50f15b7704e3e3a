//! Which layers are mixtures, by the tensors and by `config.json`; and tensors of groups that there are not.

use std::fs;

use rankmix::convert::{LatentOptions, ModelOptions, convert_model};
use rankmix::formats::{Dtype, MoeModel};
use rankmix::{Error, Result};
use serde_json::{Value, json};

use super::written::{Family, Model, Stored};

/// A model of layers 0 to 3, the first dense, opened with these keys in its configuration; without the mixtures of the layers `without`.
fn opened(family: Family, keys: &Value, without: &[usize]) -> Result<MoeModel> {
    let mut model: Model = family.model(3, Dtype::F32);
    let block = family.block();
    model.tensors.retain(|tensor| {
        !without.iter().any(|layer| {
            let path = format!("model.layers.{layer}.{block}");
            tensor.name.starts_with(&format!("{path}.experts."))
                || tensor.name == format!("{path}.gate.weight")
        })
    });
    if let (Value::Object(config), Value::Object(keys)) = (&mut model.config, keys) {
        config.extend(keys.clone());
    }
    let folder = tempfile::tempdir().expect("a folder of its own");
    model.write(folder.path(), 2);
    MoeModel::open(folder.path())
}

fn refused(family: Family, keys: &Value, without: &[usize], words: &[&str]) {
    let error = opened(family, keys, without).expect_err("the two do not agree");
    assert!(matches!(error, Error::Format { .. }), "{error:?}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` does not name {word}");
    }
}

#[test]
fn layers_that_lack_their_mixture_are_not_taken_for_dense() -> Result<()> {
    let keys = json!({"num_hidden_layers": 4, "mlp_only_layers": [0]});
    assert_eq!(opened(Family::Qwen3, &keys, &[])?.layers().len(), 3);
    let words = ["layer 2 of 4 is a mixture", "neither", "`mlp_only_layers`"];
    refused(Family::Qwen3, &keys, &[2], &words);
    // Nothing says how many layers there should be.
    let unknown = json!({"mlp_only_layers": [0]});
    assert_eq!(opened(Family::Qwen3, &unknown, &[2])?.layers().len(), 2);
    // A family whose rule is not known.
    let other = json!({"num_hidden_layers": 4, "model_type": "something_else"});
    assert_eq!(opened(Family::Qwen3, &other, &[2])?.layers().len(), 2);
    // No layer of a Mixtral is dense.
    let all = json!({"num_hidden_layers": 4});
    refused(Family::Mixtral, &all, &[], &["layer 0 of 4", "mixtral"]);
    Ok(())
}

#[test]
fn every_key_that_leaves_layers_dense_is_followed() -> Result<()> {
    for (family, keys, without) in [
        (Family::Qwen2, json!({"mlp_only_layers": [0, 2]}), &[2][..]),
        (Family::Qwen2, json!({"decoder_sparse_step": 2}), &[2]),
        (Family::Qwen3, json!({"decoder_sparse_step": 4}), &[1, 2]),
        (
            Family::DeepSeekV3,
            json!({"first_k_dense_replace": 2}),
            &[1],
        ),
        (Family::DeepSeekV3, json!({}), &[1, 2]),
        (
            Family::DeepSeekV2,
            json!({"first_k_dense_replace": 1, "moe_layer_freq": 2}),
            &[1, 3],
        ),
        (
            Family::Qwen3,
            json!({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "mlp_only_layers": [1]}),
            &[2],
        ),
    ] {
        let mut keys = keys;
        keys["num_hidden_layers"] = json!(4);
        let found = opened(family, &keys, without)?.layers().len();
        assert_eq!(found, 3 - without.len(), "{family:?} {keys}");
        // With the mixtures that should not be there.
        let first = format!("layer {} of 4 is dense", without[0]);
        refused(family, &keys, &[], &[&first, "has experts"]);
    }
    // Layers that predict further tokens are behind the last one.
    let keys = json!({"num_hidden_layers": 3, "first_k_dense_replace": 1});
    assert_eq!(opened(Family::DeepSeekV3, &keys, &[])?.layers().len(), 3);
    let keys =
        json!({"num_hidden_layers": 1_000_000_000_000_000_000_u64, "mlp_layer_types": ["sparse"]});
    refused(Family::Qwen3, &keys, &[], &["`num_hidden_layers`", "65536"]);
    // No mixture at all.
    let keys = json!({"num_hidden_layers": 4, "mlp_only_layers": [0]});
    refused(Family::Qwen3, &keys, &[1, 2, 3], &["layer 1 of 4"]);
    let keys = json!({"num_hidden_layers": 4, "decoder_sparse_step": 0});
    refused(Family::Qwen3, &keys, &[], &["`decoder_sparse_step` = 0"]);
    Ok(())
}

#[test]
fn tensors_of_groups_that_there_are_not_are_named() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out, odd] = ["in", "out", "odd"].map(|name| folder.path().join(name));
    Family::Qwen3.model(1, Dtype::F32).write(&source, 1);
    let options = ModelOptions::new(LatentOptions::new(2, 5));
    convert_model(&source, &out, &options, &|_| {}).expect("a sound model");
    let config = fs::read_to_string(out.join("config.json")).expect("a file");
    let read = rankmix::formats::Checkpoint::open(&out).expect("the output");
    // A third group, and the down projection of a group whose experts have whole ones.
    for part in ["2.gate_latent", "0.down_latent"] {
        let name = format!("model.layers.1.mlp.groups.{part}.weight");
        let mut tensors: Vec<Stored> = read
            .tensors()
            .map(|(name, entry)| Stored {
                name: name.to_owned(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                bytes: read.raw(name).expect("a tensor that is there").to_owned(),
            })
            .collect();
        tensors.push(Stored {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: vec![1, 1],
            bytes: vec![0; 4],
        });
        let mut model = Family::Qwen3.model(1, Dtype::F32);
        model.tensors = tensors;
        model.config = serde_json::from_str(&config).expect("JSON");
        model.write(&odd, 1);
        let error = MoeModel::open(&odd).expect_err("a tensor of no group");
        let message = error.to_string();
        assert!(
            message.contains(&format!("`{name}` at byte"))
                && message.contains("model.safetensors")
                && message.contains("2 groups"),
            "{message}"
        );
    }
}
