//! `rankmix convert loras-to-comol` and `moe-lora-to-comol`, as they are run.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use rankmix::convert::CoreReport;
use rankmix::formats::{
    LoraPair, MixtureAdapter, MixtureKind, MixtureLayer, PeftAdapter, Target, TensorFile,
};
use rankmix::layers::{AdapterOptions, Linear, MoeLora, Routing};
use rankmix::{Error, Tensor};

fn rankmix(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rankmix"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("the program starts")
}

fn floats(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| ((i * i + 31 * seed + i) as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

fn write_lora(path: &Path, seed: usize) {
    let pair = LoraPair {
        target: Target::Linear,
        a: floats(&[2, 12], seed),
        b: floats(&[10, 2], seed + 1),
        bias: None,
        scale: 1.5,
    };
    let mut adapter = PeftAdapter::of_pairs([("layers.0.q_proj".to_owned(), pair)].into());
    let base = "some/model".into();
    adapter
        .config
        .others
        .insert("base_model_name_or_path".to_owned(), base);
    adapter.write(path).expect("a folder of its own");
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn assert_refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for word in words {
        assert!(message.contains(word), "`{message}` does not name {word}");
    }
}

#[test]
fn loras_are_converted_and_what_is_there_stays() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = folder.path();
    write_lora(&at.join("one"), 1);
    write_lora(&at.join("two"), 5);
    let run = |arguments: &[&str]| rankmix(arguments, at);
    let done = run(&["convert", "loras-to-comol", "new/out/", "one", "two"]);
    assert!(done.status.success(), "{done:?}");
    let out = at.join("new/out");
    let made = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "conversion.json",
    ];
    assert_eq!(names(&out), made);
    assert_eq!(names(&at.join("new")), ["out"]);
    let comol = MixtureAdapter::read(&out).expect("just written");
    assert_eq!(comol.kind(), Some(MixtureKind::CoMol));
    assert_eq!(comol.others["base_model_name_or_path"], "some/model");
    let report = fs::read_to_string(out.join("conversion.json")).expect("the report");
    let report: CoreReport = serde_json::from_str(&report).expect("a report");
    assert!(report.lossless);
    assert_eq!(report.layers[0].experts[1].source, "two");
    let shown = run(&["inspect", "new/out"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for word in [
        "CoMoL adapter",
        "rank 4",
        "2 experts",
        "some/model",
        "layers.*.q_proj.core",
    ] {
        assert!(shown.contains(word), "`{shown}` does not say {word}");
    }

    // What is there stays, but for the asking, and foreign files and inputs always.
    let before = made.map(|name| fs::read(out.join(name)).expect("a file"));
    assert_refused(
        &run(&["convert", "loras-to-comol", "new/out", "one"]),
        &["new/out", "overwrite"],
    );
    assert!(made.map(|name| fs::read(out.join(name)).expect("a file")) == before);
    // What a run that was killed while it wrote the adapter has left is no part of the output.
    let left = at.join("new/out.partial");
    fs::create_dir_all(left.join("adapter.writing-0")).expect("a folder");
    let report = r#"{"unfinished": true, "options": {"kind": "comol"}, "source": {}}"#;
    fs::write(left.join("conversion.json"), report).expect("a file");
    fs::write(left.join("adapter.writing-0/adapter_config.json"), "{").expect("a file");
    let again = run(&[
        "convert",
        "loras-to-comol",
        "--overwrite",
        "--expert",
        "1",
        "--rank",
        "3",
        "new/out",
        "one",
        "two",
    ]);
    assert!(again.status.success(), "{again:?}");
    let comol = MixtureAdapter::read(&out).expect("just written");
    assert_eq!(comol.layers["layers.0.q_proj"].options().rank, 3);
    assert_eq!(
        comol.tensors["layers.0.q_proj.router_bias"].to_f32(),
        [0.0, 1.0]
    );
    assert_eq!(names(&at.join("new")), ["out"]);
    assert_eq!(names(&out), made);
    fs::write(out.join("notes.txt"), "mine").expect("a folder of its own");
    assert_refused(
        &run(&["convert", "loras-to-comol", "--overwrite", "new/out", "one"]),
        &["notes.txt"],
    );
    assert_refused(
        &run(&[
            "convert",
            "loras-to-comol",
            "--overwrite",
            "one",
            "one",
            "two",
        ]),
        &["input"],
    );
    // Neither is what no conversion has made, nor what lies in an input; that is known before the work.
    for taken in ["three", "one/inside"] {
        if taken == "three" {
            write_lora(&at.join(taken), 9);
        }
        let before = names(&at.join("one"));
        assert_refused(
            &run(&[
                "convert",
                "loras-to-comol",
                "--overwrite",
                taken,
                "one",
                "two",
            ]),
            &[taken],
        );
        assert_eq!(names(&at.join("one")), before);
    }
    fs::remove_dir_all(at.join("three")).expect("just written");
    assert_eq!(names(at), ["new", "one", "two"]);
}

#[test]
fn damaged_input_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = folder.path();
    write_lora(&at.join("one"), 1);
    write_lora(&at.join("two"), 5);
    let path = at.join("two/adapter_model.safetensors");
    let mut file = TensorFile::read(&path).expect("just written");
    file.tensors.pop_first();
    file.write(&path).expect("a folder of its own");
    let run = |arguments: &[&str]| rankmix(arguments, at);
    assert_refused(
        &run(&["convert", "loras-to-comol", "out", "one", "two"]),
        &["layers.0.q_proj", "lora_A"],
    );
    assert_refused(
        &run(&["convert", "loras-to-comol", "out", "one", "absent"]),
        &["absent"],
    );
    assert_refused(
        &run(&["convert", "moe-lora-to-comol", "out", "one"]),
        &["loras-to-comol"],
    );
    assert_eq!(names(at), ["one", "two"]);
    let help = run(&["convert", "loras-to-comol", "--help"]);
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for word in [
        "OUT_DIR",
        "LORA_DIR",
        "--rank",
        "--overwrite",
        "conversion.json",
    ] {
        assert!(help.contains(word), "`{help}` does not say {word}");
    }
}

#[test]
fn an_unfinished_conversion_of_a_model_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = folder.path();
    write_lora(&at.join("one"), 1);
    let partial = at.join("out.partial");
    fs::create_dir(&partial).expect("a folder");
    let report = r#"{"unfinished": true, "options": {"latent": 4}, "source": {}}"#;
    fs::write(partial.join("conversion.json"), report).expect("a file");
    fs::write(partial.join("model.safetensors"), "hours").expect("a file");
    let run = |more: &[&str]| {
        let arguments = [&["convert", "loras-to-comol", "out", "one"], more].concat();
        rankmix(&arguments, at)
    };
    let refused = run(&[]);
    assert_refused(&refused, &["out.partial", "latent 4", "remove this folder"]);
    // It names no option that the command does not have.
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!message.contains("restart"), "{message}");
    let unknown = String::from_utf8_lossy(&run(&["--restart"]).stderr).into_owned();
    assert!(unknown.contains("unexpected argument"), "{unknown}");
    assert_eq!(names(&partial), ["conversion.json", "model.safetensors"]);
}

#[test]
fn a_moe_lora_is_converted() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = folder.path();
    let base = Linear::new("layers.0.q_proj", 12, 10);
    let layer = MixtureLayer::from(MoeLora::new(
        base,
        AdapterOptions::new(2, 4.0),
        Routing::new(3, 2),
    )?);
    let mut adapter = MixtureAdapter::default();
    for (seed, (name, dims)) in layer.parameters()?.into_iter().enumerate() {
        adapter.tensors.insert(name, floats(&dims, seed));
    }
    adapter.layers.insert("layers.0.q_proj".to_owned(), layer);
    adapter.write(at.join("source"))?;
    let done = rankmix(
        &[
            "convert",
            "moe-lora-to-comol",
            "out",
            "source",
            "--core-routing",
        ],
        at,
    );
    assert!(done.status.success(), "{done:?}");
    let comol = MixtureAdapter::read(at.join("out"))?;
    assert_eq!(comol.layers["layers.0.q_proj"].options().rank, 6);
    assert_eq!(
        comol.layers["layers.0.q_proj"].routing(),
        Some(&Routing::new(3, 2))
    );
    Ok(())
}
