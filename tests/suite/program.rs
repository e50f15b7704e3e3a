//! The program's commands that measure: sizes beyond every limit are errors before there is work, and a file of kernels loses nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use libtest_mimic::{Completion, Failed, Trial};
use rankmix::{Device, DeviceOptions};

/// The smallest layer of every kind; of several values for one option the command line has the last one here.
const SMALL: [(&str, usize); 8] = [
    ("--tokens", 4),
    ("--d-in", 16),
    ("--d-out", 16),
    ("--rank", 4),
    ("--hidden", 16),
    ("--intermediate", 16),
    ("--latent", 8),
    ("--experts", 8),
];

const LAYERS: [(&str, &[&str]); 6] = [
    ("lora", &["--tokens", "--d-in", "--d-out", "--rank"]),
    ("moe_lora", &["--tokens", "--d-in", "--rank", "--experts"]),
    ("rotmole", &["--tokens", "--d-out", "--rank", "--experts"]),
    ("comol", &["--tokens", "--d-in", "--rank", "--experts"]),
    (
        "moe",
        &["--tokens", "--hidden", "--intermediate", "--experts"],
    ),
    (
        "latent_moe",
        &["--tokens", "--hidden", "--latent", "--experts"],
    ),
];

/// More than memory, twice what times 1024 is 0 in 64 bits, and the largest.
const ABSURD: [usize; 3] = [1_000_000_000_000, 1 << 54, usize::MAX];

fn layer_arguments(layer: &str, replaced: (&str, usize)) -> Vec<String> {
    let mut arguments = vec!["--layer".to_owned(), layer.to_owned()];
    for (option, size) in SMALL {
        let size = if option == replaced.0 {
            replaced.1
        } else {
            size
        };
        arguments.extend([option.to_owned(), size.to_string()]);
    }
    arguments
}

/// That a command fails as it does for what it has understood: by status 2, with a line that says this.
fn refused(what: &str, output: &Output, said: &[&str]) -> Result<(), Failed> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let found = stderr
        .lines()
        .any(|line| line.starts_with("rankmix: ") && said.iter().any(|part| line.contains(part)));
    if output.status.code() == Some(2) && found {
        Ok(())
    } else {
        Err(format!("{what}: {}, {stderr}", output.status).into())
    }
}

fn absurd_sizes_are_refused(program: &str, command: &str, device: &str) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    for (layer, options) in LAYERS {
        for option in options {
            for size in ABSURD {
                let output = Command::new(program)
                    .current_dir(folder.path())
                    .args([command, "--device", device])
                    .args(layer_arguments(layer, (option, size)))
                    .output()?;
                let what = format!("{command} --layer {layer} {option} {size}");
                let said = ["the limit is", "must"];
                refused(&what, &output, &said)?;
            }
        }
    }
    Ok(())
}

/// Sizes that a graph allows and the system does not.
#[cfg(target_os = "linux")]
fn memory_that_is_not_there_is_an_error(program: &str) -> Result<(), Failed> {
    // 4 GB of addresses, as that is what the system is sure to refuse by: its memory may be any.
    let limited = r#"ulimit -v 4000000; exec "$0" "$@""#;
    for (layer, option, size) in [
        ("lora", "--tokens", 100_000_000),
        ("lora", "--d-in", 100_000_000),
        ("moe", "--intermediate", 10_000_000),
    ] {
        let output = Command::new("sh")
            .args(["-c", limited, program, "time", "--device", "cpu"])
            .args(layer_arguments(layer, (option, size)))
            .output()?;
        let what = format!("time --layer {layer} {option} {size}");
        refused(&what, &output, &["is out of memory: "])?;
    }
    Ok(())
}

fn tune(program: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["tune", "--device", "vulkan"]);
    command.args(layer_arguments("lora", ("--tokens", 64)));
    command
}

/// Nothing is measured for a file that cannot be written.
fn a_folder_that_is_not_there_is_known_at_once(program: &str) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("a file"), "")?;
    for out in ["nosuch/kernels.json", "a file/kernels.json"] {
        let output = tune(program)
            .current_dir(folder.path())
            .args(["--out", out])
            .output()?;
        refused(out, &output, &["No such file", "Not a directory"])?;
        if !output.stdout.is_empty() {
            return Err(format!("{out}: {}", String::from_utf8_lossy(&output.stdout)).into());
        }
    }
    Ok(())
}

/// What another run adds to the file while this one measures.
fn choices_of_two_runs_stay(program: &str) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("kernels.json");
    let mut child = tune(program)
        .arg("--out")
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    // It has looked at the file and begins to measure.
    lines.next().ok_or("it said nothing")??;
    let other = r#"{"format": "rankmix kernels", "version": 1, "adapters": {"Other (Metal)": {"matmul nt 1 x 1 x 1": "plain"}}}"#;
    fs::write(&path, other)?;
    for line in lines {
        line?;
    }
    assert!(child.wait()?.success(), "it failed");
    let found: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    let adapters = found["adapters"].as_object().ok_or("no adapters")?;
    assert_eq!(
        adapters["Other (Metal)"]["matmul nt 1 x 1 x 1"], "plain",
        "the other run's choices are gone"
    );
    assert!(adapters.len() == 2, "{found}");
    let left: Vec<_> = fs::read_dir(folder.path())?.collect();
    assert_eq!(left.len(), 1, "{left:?}");
    Ok(())
}

/// A test of the program where it is built and has this device.
fn trial(
    name: &str,
    device: &'static str,
    check: impl FnOnce(&str) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(format!("program::{name}::{device}"), move || {
        let Some(program) = option_env!("CARGO_BIN_EXE_rankmix") else {
            return Ok(Completion::ignored_with(
                "there is no program without the feature `cli`",
            ));
        };
        let opened = Device::open_with(&DeviceOptions {
            request: Some(device.to_owned()),
            ..DeviceOptions::default()
        });
        if let Err(error) = opened {
            return Ok(Completion::ignored_with(error.to_string()));
        }
        check(program)?;
        Ok(Completion::Completed)
    })
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (command, device) in [("time", "cpu"), ("time", "vulkan"), ("tune", "vulkan")] {
        let name = format!("absurd_sizes_are_refused_by_{command}");
        trials.push(trial(&name, device, move |program| {
            absurd_sizes_are_refused(program, command, device)
        }));
    }
    #[cfg(target_os = "linux")]
    trials.push(trial(
        "memory_that_is_not_there_is_an_error",
        "cpu",
        memory_that_is_not_there_is_an_error,
    ));
    trials.push(trial(
        "a_folder_that_is_not_there_is_known_at_once",
        "vulkan",
        a_folder_that_is_not_there_is_known_at_once,
    ));
    trials.push(trial(
        "choices_of_two_runs_stay",
        "vulkan",
        choices_of_two_runs_stay,
    ));
    trials
}
