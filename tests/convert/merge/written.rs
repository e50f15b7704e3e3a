//! What is in the folder that is made, and what the program says of it.

use std::fs;
use std::path::Path;

use rankmix::convert::MergeOptions;
use rankmix::formats::{Dtype, PeftAdapter, Target};
use rankmix::{Error, Result};
use serde_json::{Value, json};

use super::{merge, merged_alone, pair, write_model};

#[test]
fn sums_beyond_a_type_are_refused_and_the_configuration_says_32_bits() -> Result<()> {
    let mut large = pair(Target::Linear, [6, 2, 8], 1);
    large.scale = 1e6;
    let lora = PeftAdapter::of_pairs([("a".to_owned(), large)].into());
    let options = MergeOptions {
        dtype: Some(Dtype::F16),
        ..MergeOptions::default()
    };
    let error = merged_alone("a.weight", &[6, 8], &lora, &options).expect_err("beyond 16 bits");
    assert!(
        matches!(&error, Error::Limit { thing, .. } if thing.contains("`a.weight`")),
        "{error}"
    );

    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let tensors = [("a.weight".to_owned(), vec![6, 8], Dtype::BF16)];
    let config = json!({"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1}});
    write_model(&folder.join("model"), &tensors, &config);
    lora.write(folder.join("lora"))?;
    // An adapter in the model's own folder does not make one of the result.
    fs::write(folder.join("model/adapter_config.json"), "{}").expect("a file");
    let said = |folder: &Path| -> Value {
        let text = fs::read_to_string(folder.join("out/config.json")).expect("a file");
        serde_json::from_str(&text).expect("JSON")
    };
    let mut options = MergeOptions::default();
    merge(folder, &options)?;
    assert_eq!(said(folder), config);
    options.dtype = Some(Dtype::F32);
    let error = merge(folder, &options).expect_err("an output is there");
    assert!(error.to_string().contains("overwrite"), "{error}");
    options.overwrite = true;
    merge(folder, &options)?;
    let single = json!({"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": 1}});
    assert_eq!(said(folder), single);
    assert!(!folder.join("out/adapter_config.json").exists());
    // What another run has left is thrown away if that is asked for, and not taken into the result.
    fs::rename(folder.join("out"), folder.join("out.partial")).expect("the output");
    let left = json!({"unfinished": true, "options": {}, "source": {}});
    fs::write(folder.join("out.partial/conversion.json"), left.to_string()).expect("a file");
    fs::write(folder.join("out.partial/left.txt"), "").expect("a file");
    let error = merge(folder, &options).expect_err("another conversion");
    assert!(error.to_string().contains("restart"), "{error}");
    options.restart = true;
    merge(folder, &options)?;
    assert!(!folder.join("out/left.txt").exists());
    Ok(())
}

#[cfg(feature = "cli")]
#[test]
fn the_program_says_what_it_did_and_what_rounding_lost() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = folder.path();
    let tensors = [("a.weight".to_owned(), vec![6, 8], Dtype::BF16)];
    write_model(&at.join("model"), &tensors, &json!({}));
    fs::write(at.join("model/pytorch_model.bin"), "").expect("a file");
    let mut small = pair(Target::Linear, [6, 2, 8], 1);
    small.scale = 1e-3;
    PeftAdapter::of_pairs([("a".to_owned(), small)].into()).write(at.join("lora"))?;
    let run = |more: &[&str]| {
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_rankmix"))
            .args(["convert", "merge-lora", "model", "lora", "out"])
            .args(more)
            .current_dir(at)
            .output()
            .expect("the program starts");
        let [out, error] =
            [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (done.status.code(), out, error)
    };
    let (code, out, error) = run(&[]);
    assert_eq!(code, Some(0), "{error}");
    assert!(out.contains("tensors changed: 1"), "{out}");
    for word in [
        "rounding lost",
        "`a.weight`",
        "--dtype f32",
        "pytorch_model.bin",
    ] {
        assert!(error.contains(word), "`{error}` does not name {word}");
    }
    let (code, _, error) = run(&["--dtype", "f32", "--overwrite"]);
    assert_eq!(code, Some(0), "{error}");
    assert!(!error.contains("rounding"), "{error}");
    let (code, _, error) = run(&[]);
    assert_eq!(code, Some(2));
    assert!(error.contains("overwrite"), "{error}");
    Ok(())
}
