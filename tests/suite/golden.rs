//! The golden cases on every device.

use std::path::{Path, PathBuf};

use libtest_mimic::{Failed, Trial};
use rankmix::Device;
use rankmix::golden::GoldenCase;

/// Cases of layers that the crate has.
fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the golden cases are part of the repository")
        .map(|entry| entry.expect("a folder can be listed").path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            ["lora_", "moe_lora_", "rotmole_", "moe_", "latent_moe_"]
                .iter()
                .any(|layer| name.starts_with(layer))
        })
        .collect();
    files.sort();
    assert!(
        files.len() >= 16,
        "there are only {} golden cases",
        files.len()
    );
    files
}

fn check(path: &Path, device: &Device) -> Result<(), Failed> {
    let replay = GoldenCase::read(path)?.replay(device)?;
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
        trials.extend(devices_of(&name, path));
    }
    trials
}

fn devices_of(name: &str, path: PathBuf) -> Vec<Trial> {
    crate::devices::trials(&format!("golden::{name}"), move |device| {
        check(&path, device)
    })
}
