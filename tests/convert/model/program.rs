//! What the program prints.

use std::process::Command;

use rankmix::formats::Dtype;

use super::written::Family;

#[test]
fn the_report_as_json_and_the_facts_of_source_and_output() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let [source, out] = ["in", "out"].map(|name| folder.path().join(name));
    Family::Qwen2.model(2, Dtype::F32).write(&source, 1);
    let run = |arguments: &[&str]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_rankmix"));
        let output = program.args(arguments).output().expect("the program");
        let [text, errors] =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"));
        assert!(output.status.success(), "{errors}");
        text
    };
    let [source, out] = [&source, &out].map(|path| path.to_str().expect("a path of letters"));
    let convert = ["convert", "moe-to-latent", source, out];
    let options = [
        "--groups",
        "2",
        "--latent",
        "5",
        "--rank",
        "4",
        "--factored-down",
        "--group-by",
        "similarity",
        "--svd",
        "randomized",
        "--precision",
        "f32",
        "--dtype",
        "bf16",
        "--jobs",
        "2",
        "--json",
    ];
    let text = run(&[convert.as_slice(), &options].concat());
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON and nothing else");
    assert_eq!(report["layers"][0]["rank"], 4);
    assert_eq!(report["layers"][0]["factored_down"], true);
    assert_eq!(report["run"]["files_written"], 3);
    if cfg!(target_os = "linux") {
        assert!(report["run"]["peak_memory_bytes"].as_u64() > Some(1 << 20));
    }
    let old = run(&["inspect", source]);
    assert!(old.contains("(qwen2_moe): 2 experts a token"), "{old}");
    let layers =
        "model.layers.*.mlp (2): 4 experts 12 to 8, F32, a shared expert 6, gated; an expert each";
    assert!(old.contains(layers), "{old}");
    let new = run(&["inspect", out]);
    let layers = "4 experts 12 to 8, BF16, latent width 5 in 2 groups, down factored, a shared expert 6, gated; latent experts";
    assert!(new.contains(layers), "{new}");
    // The table for people.
    let table = run(&[convert.as_slice(), &options[..4], &["--overwrite"]].concat());
    assert!(table.contains("model.layers.2.mlp   4 in 2"), "{table}");
}

#[test]
fn nobody_reads() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    Family::Qwen2
        .model(1, Dtype::F32)
        .write(&folder.path().join("in"), 1);
    let program = |arguments: &[&str]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_rankmix"));
        program.args(arguments).current_dir(folder.path());
        program
    };
    let closed = || {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        writer
    };
    // Without a word.
    let output = program(&["inspect", "in"]).stdout(closed()).output();
    let output = output.expect("the program");
    assert_eq!(output.status.code(), Some(141));
    assert!(output.stderr.is_empty(), "{output:?}");
    // Errors and warnings nobody reads change nothing.
    let output = program(&["inspect", "absent"]).stderr(closed()).output();
    assert_eq!(output.expect("the program").status.code(), Some(2));
    std::fs::write(folder.path().join("in/pytorch_model.bin"), "old").expect("a file");
    let convert = [
        "convert",
        "moe-to-latent",
        "in",
        "out",
        "--groups",
        "2",
        "--latent",
        "5",
    ];
    let output = program(&convert).stderr(closed()).output();
    assert_eq!(output.expect("the program").status.code(), Some(0));
    assert!(folder.path().join("out/conversion.json").exists());
}

#[test]
fn the_help_says_what_happens_after_an_interruption() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_rankmix"));
    let output = program
        .args(["convert", "moe-to-latent", "--help"])
        .output();
    let help = String::from_utf8(output.expect("the program").stdout).expect("text");
    for word in [
        "OUT_DIR.partial",
        "After an interruption",
        "--restart",
        "memory of one layer",
        "[default: 1]",
    ] {
        assert!(help.contains(word), "`{help}` does not say {word}");
    }
}
