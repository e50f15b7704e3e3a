//! The golden cases on every device.

use std::path::{Path, PathBuf};

use libtest_mimic::{Failed, Trial};
use rankmix::golden::GoldenCase;
use rankmix::{Device, Precision};

use crate::devices;

/// All cases there are.
fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the golden cases are part of the repository")
        .map(|entry| entry.expect("a folder can be listed").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect();
    files.sort();
    assert!(
        files.len() >= 32,
        "there are only {} golden cases",
        files.len()
    );
    files
}

fn check(path: &Path, device: &Device, precision: Precision) -> Result<(), Failed> {
    let replay = GoldenCase::read(path)?.replay_stored(device, precision)?;
    if replay.ok {
        Ok(())
    } else {
        Err(format!("{replay:?}").into())
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for path in files() {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        for (precision, suffix) in [(Precision::F32, ""), (Precision::F16, "_f16")] {
            let path = path.clone();
            let name = format!("golden::{name}{suffix}");
            trials.extend(devices::trials(&name, move |device| {
                check(&path, device, precision)
            }));
        }
    }
    trials
}
