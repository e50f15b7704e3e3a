//! `rankmix convert moe-lora-to-comol`.

use std::path::PathBuf;
use std::process::ExitCode;

use rankmix::convert::{DistillOptions, check_comol_folder, moe_lora_to_comol, write_comol};
use rankmix::formats::Adapter;
use rankmix::layers::CoreRouting;
use rankmix::{Error, Result};

use crate::convert::{LAYERS, bar, summary};

/// What to convert, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The folder to make: adapter_config.json, adapter_model.safetensors, conversion.json.
    #[arg(value_name = "OUT_DIR")]
    out: PathBuf,
    /// The folder of a MoE-LoRA or RotMoLE adapter in our layout, or of MoLA as MoE-PEFT has it.
    #[arg(value_name = "MOE_LORA_DIR")]
    mixture: PathBuf,
    /// The rank of the CoMoL layers, at most [default: for each layer the smallest that loses nothing]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Project the router too, so that it looks at the latent and not at the layer's input: fewer elements, other choices.
    #[arg(long)]
    core_routing: bool,
    /// Replace OUT_DIR if it holds an earlier result, which stays until the new one is whole.
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let inputs = [options.mixture.as_path()];
    check_comol_folder(&options.out, &inputs, options.overwrite)?;
    let mut plain = Vec::new();
    let mixture = match Adapter::read(&options.mixture)? {
        Adapter::Mixture(mixture) => mixture,
        Adapter::MoePeft(adapter) => {
            let paths = adapter.plain.pairs.keys();
            plain.extend(paths.map(|path| format!("the plain LoRA of `{path}`")));
            adapter.mixture
        }
        Adapter::Lora(_) => {
            return Err(Error::Setting {
                setting: "MOE_LORA_DIR",
                value: options.mixture.display().to_string(),
                reason: "a plain LoRA adapter; `rankmix convert loras-to-comol` takes those"
                    .to_owned(),
            });
        }
    };
    let bar = bar(LAYERS, mixture.layers.len());
    let conversion = DistillOptions {
        rank: options.rank,
        routing: if options.core_routing {
            CoreRouting::Core
        } else {
            CoreRouting::Raw
        },
    };
    let (comol, mut report) = moe_lora_to_comol(&mixture, &conversion, |_| bar.inc(1))?;
    bar.finish_and_clear();
    report.left_out.extend(plain);
    write_comol(&options.out, &inputs, options.overwrite, &comol, &report)?;
    let kind = mixture
        .kind()
        .map_or_else(String::new, |kind| kind.to_string());
    println!("{}: CoMoL of {kind}", options.out.display());
    summary::print(&report);
    Ok(ExitCode::SUCCESS)
}
