//! `rankmix replay`.

use std::path::PathBuf;
use std::process::ExitCode;

use rankmix::Result;
use rankmix::golden::GoldenCase;

use crate::{DeviceArguments, StorageArguments};

/// What to replay, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    device: DeviceArguments,
    #[command(flatten)]
    storage: StorageArguments,
    /// Golden cases (safetensors).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let device = options.device.open()?;
    let precision = options.storage.precision();
    eprintln!(
        "device: {}{}",
        device.name(),
        if device.is_checked() { ", checked" } else { "" }
    );
    let mut failed = false;
    for path in &options.files {
        let replayed = GoldenCase::read(path)
            .and_then(|case| Ok((case.replay_stored(&device, precision)?, case.name)));
        match replayed {
            Ok((replay, name)) => {
                failed |= !replay.ok;
                println!(
                    "{name}  {}  output {:.2e}, worst gradient {:.2e} ({}), experts {}",
                    if replay.ok { "ok" } else { "FAIL" },
                    replay.output_error,
                    replay.gradient_error,
                    replay.worst_gradient,
                    if replay.experts_equal {
                        "equal"
                    } else {
                        "DIFFER"
                    },
                );
            }
            Err(error) => {
                failed = true;
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                println!("{name}  FAIL  {error}");
            }
        }
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
