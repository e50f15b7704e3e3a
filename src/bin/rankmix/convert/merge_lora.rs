//! `rankmix convert merge-lora`.

use std::path::PathBuf;
use std::process::ExitCode;

use rankmix::Result;
use rankmix::convert::{MergeOptions, merge_lora};
use rankmix::formats::Dtype;

use crate::convert::{FILES, Replacement, Written, bar, files_on, warn_not_copied};

/// A change of which more than this part is lost by rounding is worth a warning.
const MUCH: f64 = 0.1;

/// What to merge, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The model: a folder with config.json and safetensors files.
    model_dir: PathBuf,
    /// The adapter: a folder with adapter_config.json and adapter_model.safetensors.
    lora_dir: PathBuf,
    /// The folder to make; conversion.json in it says how much each tensor changed, and how much of the change rounding has lost.
    out_dir: PathBuf,
    /// Subtract what merging adds: MODEL_DIR is a merged model then. What was lost by rounding does not come back.
    #[arg(long)]
    unmerge: bool,
    /// What the tensors that change are written in; with f32 the dtype in config.json is changed too [default: what each is in; f64 becomes f32]
    #[arg(long, value_enum, value_name = "D")]
    dtype: Option<Written>,
    #[command(flatten)]
    replacement: Replacement,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let bar = bar(FILES, 0);
    let listener = files_on(&bar);
    let merge = MergeOptions {
        unmerge: options.unmerge,
        dtype: options.dtype.map(Dtype::from),
        overwrite: options.replacement.overwrite,
        restart: options.replacement.restart,
    };
    let (model, lora, out) = (&options.model_dir, &options.lora_dir, &options.out_dir);
    let report = merge_lora(model, lora, out, &merge, &listener);
    bar.finish_and_clear();
    let report = report?;
    let tensors = &report.tensors;
    let largest = tensors
        .iter()
        .map(|tensor| tensor.change)
        .fold(0.0, f64::max);
    println!(
        "{}: tensors changed: {}; the largest change is {largest:.1e} of its tensor's norm",
        out.display(),
        tensors.len()
    );
    let rounded = tensors.iter().filter(|tensor| tensor.rounding > MUCH);
    if let Some(worst) = rounded
        .clone()
        .max_by(|a, b| a.rounding.total_cmp(&b.rounding))
    {
        eprintln!(
            "rankmix: warning: rounding lost more than {:.0} % of the change of tensors: {} (`{}`: {:.0} %); --dtype f32 keeps it",
            100.0 * MUCH,
            rounded.count(),
            worst.name,
            100.0 * worst.rounding
        );
    }
    warn_not_copied(&report.not_copied);
    Ok(ExitCode::SUCCESS)
}
