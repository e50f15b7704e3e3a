//! `rankmix tune`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use clap::ValueEnum;
use rankmix::device::{AdapterSummary, KernelChoices, TunedKernels};
use rankmix::graph::TunedOperation;
use rankmix::{Error, Result};
use serde::Serialize;

use crate::time::{self, Layer, step_graph};

/// What to tune for: the forward and backward pass of a layer.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    layer: time::Options,
    /// Every layer, not one, at these sizes.
    #[arg(long, conflicts_with = "layer")]
    all_layers: bool,
    /// The file that the choices are written to; what it holds for other adapters and sizes stays. `--kernels FILE` and RANKMIX_KERNELS take it.
    #[arg(long, value_name = "FILE", default_value = "kernels.json")]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Row {
    operation: String,
    chosen: &'static str,
    kernels: Vec<Kernel>,
}

#[derive(Debug, Serialize)]
struct Kernel {
    name: &'static str,
    seconds: Option<f64>,
}

impl From<TunedOperation> for Row {
    fn from(operation: TunedOperation) -> Self {
        let kernels = operation.kernels.into_iter();
        Self {
            operation: operation.key,
            chosen: operation.chosen,
            kernels: kernels
                .map(|(name, seconds)| Kernel { name, seconds })
                .collect(),
        }
    }
}

fn print(operation: &TunedOperation) {
    println!("  {}", operation.key);
    for (name, seconds) in &operation.kernels {
        let time = seconds.map_or_else(
            || "refused by the driver".to_owned(),
            |seconds| format!("{:9.3} ms", seconds * 1e3),
        );
        let mark = if *name == operation.chosen { '*' } else { ' ' };
        println!("  {mark} {name:<14}{time}");
    }
}

/// The folder that a file is in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// What the file holds; nothing where there is none.
fn held(path: &Path) -> Result<TunedKernels> {
    if path.exists() {
        TunedKernels::load(path)
    } else {
        Ok(TunedKernels::default())
    }
}

/// That a file can be made in the folder: what cannot be kept need not be measured.
fn can_be_written(folder: &Path) -> Result<()> {
    let probe = folder.join(format!(".rankmix-tune-{}.partial", process::id()));
    let made = fs::File::create_new(&probe).and_then(|_| fs::remove_file(&probe));
    made.map_err(|source| Error::File {
        path: folder.to_owned(),
        source,
    })
}

/// Adds the choices to what the file holds by now: others may have added theirs while this adapter was measured.
fn keep(path: &Path, adapter: &AdapterSummary, choices: &KernelChoices) -> Result<()> {
    // One at a time from reading to writing. Where a folder cannot be opened or locked (Windows, some network file systems), whoever
    // reads within another's few milliseconds between the two still writes without what that one added.
    let folder = fs::File::open(folder_of(path));
    let _lock = folder.ok().filter(|folder| folder.lock().is_ok());
    let mut file = held(path)?;
    file.insert(adapter, choices);
    file.save(path)
}

pub(crate) fn run(mut options: Options) -> Result<ExitCode> {
    let device = options.layer.device.open()?;
    let Some(adapter) = device.adapter() else {
        return Err(Error::Setting {
            setting: "device",
            value: device.name(),
            reason:
                "the CPU executor has one way of doing each operation: there is nothing to choose"
                    .to_owned(),
        });
    };
    // Before the work, so that a file that cannot be used is known at once.
    held(&options.out)?;
    can_be_written(folder_of(&options.out))?;
    if !options.layer.json {
        println!(
            "kernels on {}; * the one chosen, the first the built-in rule's",
            device.name()
        );
    }
    let layers = if options.all_layers {
        Layer::value_variants().to_vec()
    } else {
        vec![options.layer.layer]
    };
    let mut choices = KernelChoices::default();
    let mut rows: Vec<Row> = Vec::new();
    for layer in layers {
        options.layer.layer = layer;
        let tuning = device.tune(&step_graph(&options.layer)?)?;
        choices.extend(&tuning.choices());
        for operation in tuning.operations {
            if rows.iter().any(|row| row.operation == operation.key) {
                continue;
            }
            if !options.layer.json {
                print(&operation);
            }
            rows.push(operation.into());
        }
    }
    keep(&options.out, adapter, &choices)?;
    if options.layer.json {
        let text = serde_json::to_string(&rows).map_err(|error| Error::Gpu {
            thing: "writing JSON".to_owned(),
            reason: error.to_string(),
        })?;
        println!("{text}");
    } else {
        println!(
            "{} choices written to {}",
            choices.len(),
            options.out.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}
