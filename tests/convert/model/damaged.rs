//! What is wrong with a source is an error that names the tensor, and leaves no output.

use std::fs;
use std::path::{Path, PathBuf};

use rankmix::convert::{LatentOptions, ModelOptions, convert_model};
use rankmix::formats::{Checkpoint, Dtype, MoeModel};
use rankmix::{Device, Error, ParameterStore, Result};
use serde_json::json;

use super::written::{EXPERTS, FAMILIES, Family, HIDDEN, INTERMEDIATE, Model, Stored, stored};

fn options() -> ModelOptions {
    ModelOptions::new(LatentOptions::new(2, 5))
}

fn convert(source: &Path, out: &Path, options: &ModelOptions) -> Result<()> {
    convert_model(source, out, options, &|_| {}).map(|_| ())
}

/// Every file under a folder with its contents.
pub(super) fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                all.push((path.clone(), fs::read(path).expect("a file")));
            }
        }
    }
    all.sort();
    all
}

/// The conversion of this model, over an old output, is refused with these words, and the old output is as it was.
fn refused(model: &Model, words: &[&str]) -> Error {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    model.write(&source, 2);
    fs::create_dir(&out).expect("a folder");
    fs::write(out.join("conversion.json"), "{}").expect("a file");
    fs::write(out.join("old.txt"), "old").expect("a file");
    let before = contents(&out);
    let mut options = options();
    options.overwrite = true;
    let error = convert(&source, &out, &options).expect_err("this must be refused");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` does not name {word}");
    }
    assert!(contents(&out) == before);
    error
}

fn position(model: &Model, name: &str) -> usize {
    let found = model.tensors.iter().position(|tensor| tensor.name == name);
    found.unwrap_or_else(|| panic!("no tensor {name}"))
}

/// The names of an expert's tensor, of the router and of a tensor that goes with it, in layer 2.
fn names(family: Family) -> [String; 2] {
    let path = format!("model.layers.2.{}", family.block());
    let expert = match family {
        Family::Mixtral => "experts.3.w3.weight",
        Family::Fused => "experts.down_proj",
        _ => "experts.3.up_proj.weight",
    };
    [format!("{path}.{expert}"), format!("{path}.gate.weight")]
}

#[test]
fn missing_tensors_and_odd_shapes_are_named() {
    for family in FAMILIES {
        for name in names(family) {
            let mut model = family.model(2, Dtype::F32);
            let at = position(&model, &name);
            model.tensors.remove(at);
            let error = refused(&model, &[&format!("`{name}`")]);
            // A router without which the experts are of nobody, or an expert that the router has.
            let is_format = matches!(error, Error::Format { .. });
            assert!(
                is_format && error.to_string().contains("missing"),
                "{error}"
            );

            let mut model = family.model(2, Dtype::F32);
            let tensor = &mut model.tensors[at];
            let rows = tensor.shape[0];
            tensor.shape[0] = rows - 1;
            tensor
                .bytes
                .truncate(tensor.bytes.len() / rows * (rows - 1));
            let error = refused(&model, &["model.layers.2"]);
            assert!(matches!(error, Error::Format { .. }), "{error}");
        }
    }
}

#[test]
fn numbers_that_are_none_are_named() {
    for family in FAMILIES {
        let mut model = family.model(2, Dtype::F32);
        let [name, _] = names(family);
        let at = position(&model, &name);
        model.tensors[at].bytes[4 * 7..4 * 8].copy_from_slice(&f32::NAN.to_le_bytes());
        let error = refused(&model, &[&format!("`{name}`"), "element 7"]);
        assert!(matches!(error, Error::Format { .. }), "{error}");
    }
}

#[test]
fn tensors_of_no_known_layout_are_named() {
    let with = |name: &str, dtype: Dtype| {
        let mut model = Family::Qwen3.model(2, Dtype::F32);
        let (shape, bytes) = (vec![4], vec![0; 4 * dtype.bitsize() / 8]);
        model.tensors.push(Stored {
            name: format!("model.layers.1.mlp.{name}"),
            dtype,
            shape,
            bytes,
        });
        model
    };
    let scale = "experts.0.up_proj.weight_scale_inv";
    refused(&with(scale, Dtype::F32), &[scale, "no layout"]);
    let beyond = "experts.4.up_proj.weight";
    refused(&with(beyond, Dtype::F32), &[beyond, "4 experts"]);
    let mixed = "experts.0.w1.weight";
    refused(
        &with(mixed, Dtype::F32),
        &["model.layers.1.mlp", "several layouts"],
    );
    // Experts in 8 bits.
    let mut model = Family::DeepSeekV3.model(2, Dtype::F32);
    let [name, _] = names(Family::DeepSeekV3);
    let at = position(&model, &name);
    let tensor = &mut model.tensors[at];
    tensor.dtype = Dtype::F8_E4M3;
    tensor.bytes.truncate(tensor.bytes.len() / 4);
    refused(&model, &[&name, "F8_E4M3"]);
    // No mixture at all.
    let mut model = Family::Qwen3.model(2, Dtype::F32);
    model.tensors.retain(|tensor| {
        !tensor.name.contains("mlp.experts") && !tensor.name.contains("mlp.gate.")
    });
    refused(&model, &["none of its layers"]);
}

#[test]
fn a_file_cut_short_is_refused_at_every_length() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    Family::Mixtral.model(1, Dtype::F32).write(&source, 2);
    let path = source.join("model-00002-of-00002.safetensors");
    let whole = fs::read(&path).expect("a file");
    for cut in (0..whole.len()).step_by(97) {
        fs::write(&path, &whole[..cut]).expect("a file");
        let error = convert(&source, &out, &options()).expect_err("a file is cut short");
        assert!(matches!(error, Error::Format { .. }), "{error}");
        assert!(
            error.to_string().contains("model-00002-of-00002"),
            "{error}"
        );
        assert!(!out.exists() && !folder.path().join("out.partial").exists());
    }
    fs::write(&path, &whole).expect("a file");
    convert(&source, &out, &options()).expect("the sound one of them");
}

#[test]
fn options_that_fit_no_layer_are_refused() {
    let model = Family::Olmoe.model(1, Dtype::F32);
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    model.write(&source, 1);
    let try_with = |change: &dyn Fn(&mut ModelOptions)| {
        let mut options = options();
        change(&mut options);
        let error = convert(&source, &out, &options).expect_err("this must be refused");
        assert!(!out.exists() && !folder.path().join("out.partial").exists());
        error
    };
    for error in [
        try_with(&|options| options.latent.groups = 3),
        try_with(&|options| options.latent.latent = HIDDEN + 1),
        try_with(&|options| options.latent.latent = 0),
        try_with(&|options| options.latent.rank = Some(INTERMEDIATE + 1)),
        try_with(&|options| options.jobs = 0),
        try_with(&|options| options.dtype = Some(Dtype::U8)),
    ] {
        assert!(matches!(error, Error::Setting { .. }), "{error}");
    }
    // Folders that lie in each other.
    for out in [
        source.clone(),
        source.join("inside"),
        folder.path().to_owned(),
    ] {
        let mut options = options();
        options.overwrite = true;
        let error = convert(&source, &out, &options).expect_err("this must be refused");
        assert!(error.to_string().contains("in each other"), "{error}");
    }
    // Without a number of experts a token takes, what a token costs cannot be said.
    let mut config = model.config.clone();
    config["num_experts_per_tok"] = json!(null);
    fs::write(source.join("config.json"), config.to_string()).expect("a file");
    let error = convert(&source, &out, &options()).expect_err("a key is missing");
    assert!(error.to_string().contains("num_experts_per_tok"), "{error}");
    // What is latent already.
    fs::write(source.join("config.json"), model.config.to_string()).expect("a file");
    convert(&source, &out, &options()).expect("a sound model");
    let again = folder.path().join("again");
    let error = convert(&out, &again, &options()).expect_err("there is nothing to convert");
    assert!(error.to_string().contains("latent already"), "{error}");
}

#[test]
fn outputs_that_are_in_the_way_are_left_alone() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out, partial, previous] =
        ["in", "out", "out.partial", "out.previous"].map(|name| folder.path().join(name));
    let model = Family::Olmoe.model(2, Dtype::F32);
    model.write(&source, 1);
    let mut over = options();
    over.overwrite = true;
    // A folder of someone else's, under either name.
    for taken in [&out, &partial] {
        fs::create_dir(taken).expect("a folder");
        fs::write(taken.join("thesis.txt"), "years").expect("a file");
        let before = contents(taken);
        let error = convert(&source, &out, &over).expect_err("this must be refused");
        assert!(error.to_string().contains("no conversion.json"), "{error}");
        assert!(contents(taken) == before);
        fs::remove_dir_all(taken).expect("the folder just made");
    }
    convert(&source, &out, &options()).expect("a sound model");
    let first = contents(&out);
    let error = convert(&source, &out, &options()).expect_err("it is there already");
    assert!(error.to_string().contains("overwrite"), "{error}");
    // An unfinished conversion with other options is thrown away only when that is asked for.
    fs::rename(&out, &partial).expect("the output");
    let state = partial.join("conversion.json");
    let text = fs::read_to_string(&state).expect("the report");
    let mut document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    document["unfinished"] = json!(true);
    fs::write(&state, document.to_string()).expect("a file");
    let before = contents(&partial);
    let mut other = options();
    other.latent.latent = 4;
    let error = convert(&source, &out, &other).expect_err("other options");
    assert!(error.to_string().contains("latent 5, now 4"), "{error}");
    assert!(contents(&partial) == before && !out.exists());
    other.restart = true;
    convert(&source, &out, &other).expect("a new start");
    let layer = |folder: &Path| {
        let model = MoeModel::open(folder).expect("the output");
        model.layers()[0]
            .latent
            .as_ref()
            .map(|latent| latent.latent)
    };
    assert_eq!(layer(&out), Some(4));
    assert!(!partial.exists());
    // The old output under the name that it has between two renames, where two folders cannot exchange theirs: the new one is whole. A folder of that
    // name alone is the user's.
    fs::rename(&out, &previous).expect("the output");
    let kept = contents(&previous);
    convert(&source, &out, &options()).expect("there is no output");
    assert!(contents(&previous) == kept);
    fs::rename(&out, &partial).expect("the output");
    convert(&source, &out, &options()).expect_err("it is there already");
    assert_eq!(layer(&out), Some(4));
    assert!(!previous.exists());
    convert(&source, &out, &over).expect("the output may be replaced");
    let report = out.join("conversion.json");
    // But for the report, which has the memory of the run in it.
    let without_report = |mut all: Vec<(PathBuf, Vec<u8>)>| {
        all.retain(|(path, _)| *path != report);
        all
    };
    assert!(without_report(contents(&out)) == without_report(first.clone()));
    // So is that of a source that was changed meanwhile.
    fs::rename(&out, &partial).expect("the output");
    let text = fs::read_to_string(&state).expect("the report");
    let mut document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    document["unfinished"] = json!(true);
    fs::write(&state, document.to_string()).expect("a file");
    let mut changed = Family::Olmoe.model(2, Dtype::F32);
    let name = "model.layers.1.mlp.experts.0.up_proj.weight";
    let at = position(&changed, name);
    let numbers = vec![0.25; INTERMEDIATE * HIDDEN];
    changed.tensors[at] = stored(name.into(), &[INTERMEDIATE, HIDDEN], &numbers, Dtype::F32);
    changed.write(&source, 1);
    let error = convert(&source, &out, &options()).expect_err("another source");
    assert!(error.to_string().contains("another source"), "{error}");
    let mut anew = options();
    anew.restart = true;
    convert(&source, &out, &anew).expect("a new start");
    let old = first
        .iter()
        .find(|(path, _)| path.ends_with("model-00002-of-00003.safetensors"));
    let new = fs::read(out.join("model-00002-of-00003.safetensors")).expect("the first layer");
    assert!(old.is_some_and(|(_, old)| *old != new));
}

#[test]
fn routers_of_other_kinds_are_refused_when_they_are_to_be_computed() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let source = folder.path().join("in");
    let model = Family::DeepSeekV3.model(1, Dtype::F32);
    model.write(&source, 1);
    let with = |key: &str, value: serde_json::Value| {
        let mut config = model.config.clone();
        config[key] = value;
        if key == "n_group" {
            config["topk_group"] = json!(1);
        }
        fs::write(source.join("config.json"), config.to_string()).expect("a file");
        // That the model can be opened and converted does not depend on it.
        let opened = MoeModel::open(&source).expect("a sound model");
        let layer = &opened.layers()[0];
        let routing = opened.config().routing(layer.experts, layer.router_bias);
        routing.and(opened.config().activation())
    };
    assert!(with("n_group", json!(1)).is_ok());
    for (key, value) in [
        ("n_group", json!(2)),
        ("scoring_func", json!("tanh")),
        ("num_experts_per_tok", json!(EXPERTS + 1)),
        ("num_experts_per_tok", json!("two")),
        ("hidden_act", json!("relu2")),
        ("routed_scaling_factor", json!(0.0)),
    ] {
        let error = with(key, value).expect_err("this must be refused");
        let known = matches!(error, Error::Format { .. } | Error::Setting { .. });
        assert!(known, "{key}: {error}");
    }
    // What transformers takes where a key is missing: 8 groups, of which 4 are chosen.
    let error = with("n_group", json!(null)).expect_err("groups of a choice");
    assert!(error.to_string().contains("`n_group` = 8"), "{error}");
    Ok(())
}

/// Opens a model and puts its first layer into a store.
fn load(model: &Model) -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    model.write(folder.path(), 1);
    let opened = MoeModel::open(folder.path())?;
    let store = ParameterStore::new(&Device::cpu());
    opened
        .load_moe(&opened.layers()[0], &store, "moe")
        .map(|_| ())
}

#[test]
fn what_a_family_has_must_be_there() {
    let without = |family: Family, end: &str| {
        let mut model = family.model(1, Dtype::F32);
        let count = model.tensors.len();
        model.tensors.retain(|tensor| !tensor.name.ends_with(end));
        assert!(model.tensors.len() < count, "no tensor {end}");
        load(&model)
    };
    for (family, end) in [
        (Family::Qwen2, "shared_expert_gate.weight"),
        (Family::DeepSeekV3, "e_score_correction_bias"),
    ] {
        load(&family.model(1, Dtype::F32)).expect("a sound model");
        let error = without(family, end).expect_err("this must be refused");
        assert!(
            matches!(error, Error::Format { .. }) && error.to_string().contains(end),
            "{error}"
        );
    }

    let mut model = Family::Qwen2.model(1, Dtype::F32);
    model
        .tensors
        .retain(|tensor| !tensor.name.contains("shared_expert"));
    let error = load(&model).expect_err("this must be refused");
    assert!(error.to_string().contains("has a shared expert"), "{error}");

    let with = |key: &str, value: serde_json::Value| {
        let mut model = Family::Mixtral.model(1, Dtype::F32);
        model.config[key] = value;
        load(&model)
    };
    with("num_local_experts", json!(EXPERTS)).expect("the number that it has");
    for (key, value) in [
        ("num_local_experts", json!(EXPERTS + 1)),
        ("n_shared_experts", json!(1)),
        // Others name their matrices as Mixtral does, and route otherwise.
        ("model_type", json!("phimoe")),
    ] {
        let error = with(key, value).expect_err("this must be refused");
        assert!(matches!(error, Error::Format { .. }), "{key}: {error}");
    }

    let mut model = Family::Mixtral.model(1, Dtype::F32);
    let end = format!("{}.gate.weight", Family::Mixtral.block());
    let router = model
        .tensors
        .iter()
        .find(|tensor| tensor.name.ends_with(&end));
    let router = router.expect("a router").name.clone();
    let name = router.replace("gate.weight", "e_score_correction_bias");
    model.tensors.push(stored(
        name.clone(),
        &[EXPERTS],
        &[0.5; EXPERTS],
        Dtype::F32,
    ));
    let error = load(&model).expect_err("a bias that is not known");
    assert!(error.to_string().contains(&name), "{error}");
}

#[test]
fn damaged_latent_layers_are_refused() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    Family::Qwen2.model(1, Dtype::F32).write(&source, 1);
    convert(&source, &out, &options())?;
    let path = out.join("config.json");
    let text = fs::read_to_string(&path).expect("the configuration");
    let sound: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let with = |key: &str, value: serde_json::Value, words: &[&str]| {
        let mut config = sound.clone();
        config["rankmix_latent_moe"][key] = value;
        fs::write(&path, config.to_string()).expect("a file");
        let error = MoeModel::open(&out)
            .expect_err("this must be refused")
            .to_string();
        for word in words {
            assert!(error.contains(word), "{error}");
        }
    };
    with("format_version", json!(2), &["version 1", "2"]);
    with(
        "groups",
        json!(3),
        &["expert_to_group", "model.layers.1.mlp"],
    );
    with("latent", json!(6), &["gate_latent", "[6, 12]"]);
    with("factored_down", json!(true), &["down_latent"]);
    with("expert_to_group", json!({}), &["model.layers.1.mlp"]);
    with(
        "expert_to_group",
        json!({"model.layers.1.mlp": [0, 0, 0, 1]}),
        &["expert_to_group"],
    );
    with(
        "expert_to_group",
        json!({"model.layers.1.mlp": [0, 9]}),
        &["expert_to_group"],
    );
    let mut config = sound.clone();
    config
        .as_object_mut()
        .and_then(|config| config.remove("rankmix_latent_moe"));
    fs::write(&path, config.to_string()).expect("a file");
    let error = MoeModel::open(&out)
        .expect_err("this must be refused")
        .to_string();
    assert!(error.contains("rankmix_latent_moe"), "{error}");
    assert!(Checkpoint::open(&out)?.tensors().count() > 0);
    Ok(())
}
