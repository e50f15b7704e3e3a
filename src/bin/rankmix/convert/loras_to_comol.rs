//! `rankmix convert loras-to-comol`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rankmix::Result;
use rankmix::convert::{CoreRouter, LoraOptions, check_comol_folder, loras_to_comol, write_comol};
use rankmix::formats::PeftAdapter;

use crate::convert::{LAYERS, bar, summary};

/// What to convert, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The folder to make: adapter_config.json, adapter_model.safetensors, conversion.json.
    #[arg(value_name = "OUT_DIR")]
    out: PathBuf,
    /// Folders of LoRA adapters of PEFT, all for one model; ranks, alphas and adapted layers may differ.
    #[arg(value_name = "LORA_DIR", required = true)]
    loras: Vec<PathBuf>,
    /// The rank of the CoMoL layers, at most [default: for each layer the smallest that loses nothing]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Send every token to this LoRA alone, counted from 0, by a selection bias that can be rewritten later.
    #[arg(long, value_name = "N")]
    expert: Option<usize>,
    /// Leave out what CoMoL has no place for (embeddings, biases, modules trained whole), and go on.
    #[arg(long)]
    leave_out: bool,
    /// Replace OUT_DIR if it holds an earlier result, which stays until the new one is whole.
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let inputs: Vec<&Path> = options.loras.iter().map(PathBuf::as_path).collect();
    // Before the work, so that a path that cannot be written is known at once.
    check_comol_folder(&options.out, &inputs, options.overwrite)?;
    let adapters = options.loras.iter().map(|path| {
        let adapter = PeftAdapter::read(path)?;
        Ok((path.display().to_string(), adapter))
    });
    let adapters = adapters.collect::<Result<Vec<_>>>()?;
    let pairs = adapters
        .iter()
        .flat_map(|(_, adapter)| adapter.pairs.keys());
    let bar = bar(LAYERS, pairs.collect::<BTreeSet<_>>().len());
    let conversion = LoraOptions {
        rank: options.rank,
        router: options
            .expert
            .map_or(CoreRouter::Uniform, CoreRouter::Expert),
        leave_out: options.leave_out,
    };
    let (comol, report) = loras_to_comol(&adapters, &conversion, |_| bar.inc(1))?;
    bar.finish_and_clear();
    write_comol(&options.out, &inputs, options.overwrite, &comol, &report)?;
    println!(
        "{}: CoMoL of {} LoRAs",
        options.out.display(),
        adapters.len()
    );
    summary::print(&report);
    Ok(ExitCode::SUCCESS)
}
