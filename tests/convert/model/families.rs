//! Models of every family: read as they are, converted at full width, everything else of them unchanged.

use std::fs;
use std::path::Path;

use rankmix::convert::{GroupBy, LatentOptions, ModelOptions, ModelReport, convert_model};
use rankmix::formats::{Checkpoint, Dtype, MoeModel};
use rankmix::layers::RoutedOutput;
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType, Value};
use serde_json::json;

use super::written::{
    EXPERTS, FAMILIES, Family, HIDDEN, INTERMEDIATE, Model, Numbers, Stored, TOP_K, write_tensors,
};

const TOKENS: usize = 24;
const GROUPS: usize = 2;

fn options(latent: usize) -> ModelOptions {
    ModelOptions::new(LatentOptions::new(GROUPS, latent))
}

fn convert(source: &Path, out: &Path, options: &ModelOptions) -> Result<ModelReport> {
    convert_model(source, out, options, &|_| {})
}

fn inputs() -> Vec<f32> {
    Numbers::new(7).take(TOKENS * HIDDEN, 1.0)
}

/// What a layer of this crate makes of the inputs, on the CPU executor.
fn computed(
    store: &ParameterStore,
    forward: impl FnOnce(&mut Graph, Value) -> Result<RoutedOutput>,
) -> Result<Vec<f32>> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
    let y = forward(&mut graph, x)?.output;
    graph.output(y)?;
    let mut session = graph.compile(store)?;
    session.set("x", &Tensor::f32([TOKENS, HIDDEN], inputs())?)?;
    Ok(session.run_reading(&[y])?[0].to_f32())
}

/// The norm of the difference by the norm.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    let error: f64 = pairs.map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| b * b).sum();
    (error / norm).sqrt()
}

fn expected(model: &Model, number: usize) -> Vec<f64> {
    let layer = &model.layers[number].1;
    inputs()
        .chunks_exact(HIDDEN)
        .flat_map(|x| layer.output(model.family, x))
        .collect()
}

/// Every layer of the source and of the output computes what the plain loops do.
fn check_outputs(model: &Model, source: &Path, out: &Path, limit: f64) -> Result<()> {
    let (source, out) = (MoeModel::open(source)?, MoeModel::open(out)?);
    assert_eq!(source.layers().len(), model.layers.len());
    assert_eq!(out.layers().len(), model.layers.len());
    for (number, (path, _)) in model.layers.iter().enumerate() {
        let expected = expected(model, number);
        let store = ParameterStore::new(&Device::cpu());
        let moe = source.load_moe(source.layer(path)?, &store, "a")?;
        assert_eq!(
            store.names().len(),
            parameters_of(&moe.shared, moe.routing.selection_bias, 4)
        );
        let of_source = difference(
            &computed(&store, |graph, x| moe.forward(graph, x))?,
            &expected,
        );
        assert!(
            of_source <= 1e-5,
            "{:?} {path}: source {of_source:e}",
            model.family
        );
        let layer = out.layer(path)?;
        assert_eq!(
            layer.latent.as_ref().map(|latent| latent.groups),
            Some(GROUPS)
        );
        let latent = out.load_latent_moe(layer, &store, "b")?;
        let of_latent = computed(&store, |graph, x| latent.forward(graph, x))?;
        let of_latent = difference(&of_latent, &expected);
        assert!(
            of_latent <= limit,
            "{:?} {path}: latent {of_latent:e}",
            model.family
        );
    }
    Ok(())
}

/// How many parameters a layer must have put into the store, so that none is taken from an initialisation.
fn parameters_of(
    shared: &Option<rankmix::layers::SharedExpert>,
    bias: bool,
    routed: usize,
) -> usize {
    let of_shared = shared.map_or(0, |shared| 3 + usize::from(shared.sigmoid_gate));
    routed + of_shared + usize::from(bias)
}

/// Everything that is not of an expert is as it was, byte for byte.
fn check_rest(model: &Model, source: &Path, out: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(out)?;
    let mut copied = 0;
    for tensor in &model.tensors {
        if tensor.name.contains(".experts.") {
            continue;
        }
        let entry = checkpoint
            .entry(&tensor.name)
            .expect("a tensor that is copied");
        assert_eq!(
            (entry.dtype, &entry.shape),
            (tensor.dtype, &tensor.shape),
            "{}",
            tensor.name
        );
        assert_eq!(
            checkpoint.raw(&tensor.name)?,
            tensor.bytes,
            "{}",
            tensor.name
        );
        copied += 1;
    }
    let parts = |name: &&str| name.contains(".groups.") || name.contains(".experts.");
    let new = checkpoint.tensors().filter(|(name, _)| parts(name)).count();
    assert_eq!(
        checkpoint.tensors().count(),
        copied + new,
        "tensors that nobody asked for"
    );
    for name in ["tokenizer.json", "more/notes.txt"] {
        let [old, new] = [source, out].map(|folder| fs::read(folder.join(name)).expect("a file"));
        assert_eq!(old, new, "{name}");
    }
    let read = |folder: &Path| {
        let text = fs::read_to_string(folder.join("config.json")).expect("a file");
        serde_json::from_str::<serde_json::Map<_, _>>(&text).expect("JSON")
    };
    let (old, mut new) = (read(source), read(out));
    assert!(new.remove("rankmix_latent_moe").is_some());
    assert_eq!(old, new);
    Ok(())
}

#[test]
fn every_family_computes_the_same_at_full_width() -> Result<()> {
    for family in FAMILIES {
        for (files, factored_down, group_by) in
            [(1, false, GroupBy::Id), (3, true, GroupBy::Similarity)]
        {
            let folder = tempfile::tempdir().expect("a folder of its own");
            let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
            let model = family.model(2, Dtype::F32);
            model.write(&source, files);
            let mut options = options(HIDDEN);
            options.latent.factored_down = factored_down;
            options.latent.group_by = group_by;
            let report = convert(&source, &out, &options)?;
            assert_eq!(report.layers.len(), 2);
            check_outputs(&model, &source, &out, 1e-5)?;
            check_rest(&model, &source, &out)?;
            assert!(!folder.path().join("out.partial").exists());
        }
    }
    Ok(())
}

#[test]
fn groups_that_are_not_consecutive_are_loaded_in_their_order() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    let mut model = Family::DeepSeekV3.model(1, Dtype::F32);
    // Experts 0 and 2 read the first half of the inputs, 1 and 3 the second: what belongs together is not side by side.
    for tensor in &mut model.tensors {
        let Some((_, rest)) = tensor.name.split_once(".experts.") else {
            continue;
        };
        if rest.contains("down") {
            continue;
        }
        let first = rest.starts_with(['0', '2']);
        let cleared = (0..INTERMEDIATE * HIDDEN).filter(|i| (i % HIDDEN < HIDDEN / 2) != first);
        for element in cleared {
            tensor.bytes[4 * element..4 * element + 4].fill(0);
        }
    }
    for (number, (gate, up)) in {
        let layer = &mut model.layers[0].1;
        layer.gate.iter_mut().zip(&mut layer.up).enumerate()
    } {
        for element in 0..INTERMEDIATE * HIDDEN {
            if (element % HIDDEN < HIDDEN / 2) != (number % 2 == 0) {
                (gate[element], up[element]) = (0.0, 0.0);
            }
        }
    }
    model.write(&source, 1);
    // Half the width holds a group of such experts, and only such.
    let mut options = options(HIDDEN / 2);
    options.latent.group_by = GroupBy::Similarity;
    let report = convert(&source, &out, &options)?;
    assert_eq!(report.layers[0].report.expert_to_group, [0, 1, 0, 1]);
    check_outputs(&model, &source, &out, 1e-5)?;
    options.latent.group_by = GroupBy::Id;
    options.overwrite = true;
    convert(&source, &out, &options)?;
    let by_id = std::panic::catch_unwind(|| check_outputs(&model, &source, &out, 1e-5));
    assert!(by_id.is_err(), "consecutive experts share nothing here");
    Ok(())
}

#[test]
fn types_are_kept_or_chosen() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let source = folder.path().join("in");
    let model = Family::Qwen3.model(2, Dtype::BF16);
    model.write(&source, 2);
    for (chosen, written, limit) in [
        (None, Dtype::BF16, 2e-2),
        (Some(Dtype::F32), Dtype::F32, 1e-5),
        (Some(Dtype::F16), Dtype::F16, 2e-3),
    ] {
        let out = folder.path().join(format!("{chosen:?}"));
        let mut options = options(HIDDEN);
        options.dtype = chosen;
        convert(&source, &out, &options)?;
        let converted = MoeModel::open(&out)?;
        for layer in converted.layers() {
            assert_eq!(layer.dtype, written);
        }
        check_outputs(&model, &source, &out, limit)?;
        check_rest(&model, &source, &out)?;
    }
    Ok(())
}

#[test]
fn what_is_read_does_not_depend_on_jobs_or_files() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let calibration = folder.path().join("calibration.safetensors");
    write_tensors(
        &calibration,
        &Family::Olmoe.model(4, Dtype::F32).inputs(40, 3),
    );
    let mut plain = Vec::new();
    for calibration in [None, Some(calibration)] {
        let outputs = outputs_of_jobs_and_files(calibration.as_deref())?;
        assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2]);
        assert!(outputs[0] != plain, "the calibration changes nothing");
        plain.clone_from(&outputs[0]);
    }
    Ok(())
}

/// The bytes and names of an output's tensors.
type Tensors = Vec<(Vec<u8>, String)>;

/// All tensors of outputs that must be equal.
fn outputs_of_jobs_and_files(calibration: Option<&Path>) -> Result<Vec<Tensors>> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let mut outputs = Vec::new();
    for (jobs, files) in [(1, 1), (3, 1), (2, 4)] {
        let [source, out] =
            ["in", "out"].map(|name| folder.path().join(format!("{name}{jobs}{files}")));
        Family::Olmoe.model(4, Dtype::F32).write(&source, files);
        let mut options = options(5);
        options.jobs = jobs;
        options.calibration = calibration.map(Path::to_owned);
        convert(&source, &out, &options)?;
        let checkpoint = Checkpoint::open(&out)?;
        let names: Vec<_> = checkpoint
            .tensors()
            .map(|(name, _)| name.to_owned())
            .collect();
        let mut all = Vec::new();
        for name in names {
            all.push((checkpoint.raw(&name)?.to_vec(), name));
        }
        outputs.push(all);
    }
    Ok(outputs)
}

#[test]
fn the_report_counts_what_was_written() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    Family::Mixtral.model(2, Dtype::F32).write(&source, 1);
    fs::write(source.join("pytorch_model.bin"), "old").expect("a file");
    let latent = 4;
    let report = convert(&source, &out, &options(latent))?;
    let checkpoint = Checkpoint::open(&out)?;
    let parts = |name: &&str| name.contains(".groups.") || name.contains(".experts.");
    let elements: usize = checkpoint
        .tensors()
        .filter(|(name, _)| parts(name))
        .map(|(_, entry)| entry.shape.iter().product::<usize>())
        .sum();
    assert_eq!(report.totals.parameters_after, elements as u64);
    let before = 2 * 3 * EXPERTS * INTERMEDIATE * HIDDEN;
    assert_eq!(report.totals.parameters_before, before as u64);
    let flops = 2 * 6 * TOP_K * INTERMEDIATE * HIDDEN;
    assert_eq!(report.totals.flops_before, flops as u64);
    assert_eq!(report.not_copied, ["pytorch_model.bin"]);
    assert!(!out.join("pytorch_model.bin").exists());
    let text = fs::read_to_string(out.join("conversion.json")).expect("the report");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["options"]["latent"], json!(latent));
    assert_eq!(document["totals"]["parameters_after"], json!(elements));
    assert_eq!(
        document["layers"][1]["path"],
        "model.layers.2.block_sparse_moe"
    );
    assert!(document["layers"][1]["errors"]["whole"]["unweighted"].as_f64() > Some(0.01));
    let index = fs::read_to_string(out.join("model.safetensors.index.json")).expect("the index");
    let index: serde_json::Value = serde_json::from_str(&index).expect("JSON");
    let bytes: usize = checkpoint.tensors().map(|(_, entry)| entry.bytes()).sum();
    assert_eq!(index["metadata"]["total_size"], json!(bytes));
    // Every expert in a group of its own, as wide as it can be, costs more than it did.
    let mut wide = options(INTERMEDIATE);
    wide.latent.groups = EXPERTS;
    wide.overwrite = true;
    let report = convert(&source, &out, &wide)?;
    assert!(report.totals.expected_change > 0.0);
    assert!(
        report
            .warnings
            .iter()
            .any(|warning| warning.contains("operations")),
        "{:?}",
        report.warnings
    );
    Ok(())
}

#[test]
fn calibration_lowers_the_error_on_its_inputs() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let source = folder.path().join("in");
    let model = Family::Qwen3.model(2, Dtype::F32);
    model.write(&source, 1);
    let tokens = 200;
    let inputs = model.inputs(tokens, 3);
    let file = folder.path().join("calibration.safetensors");
    let write = |inputs: &[Stored]| write_tensors(&file, inputs);
    write(&inputs);
    let mut with = options(5);
    with.calibration = Some(file.clone());
    let report = convert(&source, &folder.path().join("with"), &with)?;
    let plain = convert(&source, &folder.path().join("plain"), &options(5))?;
    for (with, plain) in report.layers.iter().zip(&plain.layers) {
        let (with, plain) = (&with.report, &plain.report);
        assert_eq!(with.calibration_tokens, Some(tokens));
        assert!(
            with.errors
                .whole
                .weighted
                .is_some_and(|error| error < plain.errors.whole.unweighted)
        );
        assert!(with.errors.whole.unweighted > plain.errors.whole.unweighted);
    }
    write(&inputs[..1]);
    let error = convert(&source, &folder.path().join("less"), &with)
        .expect_err("a layer's inputs are missing");
    assert!(
        error
            .to_string()
            .contains("`model.layers.2.mlp.input` is missing"),
        "{error}"
    );
    assert!(!folder.path().join("less.partial").exists());
    Ok(())
}
