//! `rankmix convert`.

mod dense_to_moe;
mod loras_to_comol;
mod merge_lora;
mod moe_lora_to_comol;
mod moe_to_latent;
mod summary;

use std::process::ExitCode;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use rankmix::Result;
use rankmix::convert::Progress;
use rankmix::formats::Dtype;

/// What the bar of a conversion of adapters looks like.
const LAYERS: &str = "{elapsed_precise} {wide_bar} {pos}/{len} layers";

/// What the bar of a conversion of models looks like.
const FILES: &str = "{bar:40} {pos}/{len} files, {elapsed} [{eta}]";

/// Shows on a bar how many files are written, and above it what is said.
fn files_on(bar: &ProgressBar) -> impl Fn(Progress<'_>) + Sync + '_ {
    |progress| match progress {
        Progress::Notice(text) => bar.suspend(|| eprintln!("rankmix: {text}")),
        Progress::Written { finished, of } => {
            bar.set_length(of as u64);
            bar.set_position(finished as u64);
        }
        Progress::Layer { .. } => {}
    }
}

/// Says what of a model's folder was not copied.
fn warn_not_copied(names: &[String]) {
    if !names.is_empty() {
        eprintln!(
            "rankmix: warning: not copied (other weights are of the model as it was, links to folders are not followed): {}",
            names.join(", ")
        );
    }
}

/// A bar on stderr, if that is a terminal.
fn bar(template: &str, length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// What may be done with what is there already.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Replacement {
    /// Replace OUT_DIR if it is an output of a conversion. The old one stays until the new one is whole.
    #[arg(long)]
    overwrite: bool,
    /// Throw away what a conversion with other options or of another model has left unfinished in OUT_DIR.partial.
    #[arg(long)]
    restart: bool,
}

/// What tensors are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Written {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, the exponent of 32.
    Bf16,
}

impl From<Written> for Dtype {
    fn from(written: Written) -> Self {
        match written {
            Written::F32 => Self::F32,
            Written::F16 => Self::F16,
            Written::Bf16 => Self::BF16,
        }
    }
}

/// What to make of what.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make several LoRA adapters the experts of one CoMoL adapter.
    ///
    /// Each LoRA becomes one core expert between an A and a B that all share. That loses nothing if the shared rank is large enough;
    /// conversion.json in OUT_DIR says for each layer what the rank is, and what each expert has lost. The router starts at zero:
    /// every token takes the mean of all LoRAs until it is trained.
    LorasToComol(loras_to_comol::Options),
    /// Make a MoE-LoRA adapter (or RotMoLE, without rotations that depend on the token, or MoLA) a CoMoL adapter.
    ///
    /// The experts become core experts between an A and a B that all share; the routing stays what it is. That loses nothing if
    /// the shared rank is large enough; conversion.json in OUT_DIR says for each layer what the rank is, and what each expert has lost.
    MoeLoraToComol(moe_lora_to_comol::Options),
    /// Make the mixtures of experts of a model into latent experts, which share their projections by groups (MoLE).
    ///
    /// Reads a Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek or transformers 5 checkpoint in safetensors and writes one whose experts work in
    /// latents that groups of experts share: gate and up of an expert become a matrix of its own times one of its group. Routers, shared experts,
    /// attention and all other tensors and files are copied unchanged. It works layer by layer: it needs the memory of one layer, not of the model.
    ///
    /// OUT_DIR is made as OUT_DIR.partial and renamed at the end. After an interruption the same command goes on with the layers that are not
    /// written yet. With other options, or if the model or the calibration has changed or is another one, it refuses to and says what differs;
    /// --restart begins anew.
    MoeToLatent(moe_to_latent::Options),
    /// Make the dense feed-forwards of a model into mixtures of experts.
    ///
    /// Splits the neurons of every dense feed-forward of a Llama-like model into experts of equal size, with a router that is fitted to how much
    /// each contributes. With as many experts a token as there are each feed-forward computes what it did before, but for rounding: down
    /// projections are multiplied by K (mixtral) or E (qwen), which is exact in 16 bits too if that is a power of two. What else the layout's
    /// family does otherwise than the model's is said as a warning, and in conversion.json.
    ///
    /// OUT_DIR is made as OUT_DIR.partial and renamed at the end. After an interruption the same command goes on with the layers that are not
    /// written yet, unless options or model are others.
    DenseToMoe(dense_to_moe::Options),
    /// Merge a LoRA adapter of PEFT into its model, or take it out again.
    ///
    /// Writes the model with W + scale B A for every weight W that the adapter changes, and with modules that were trained whole (modules_to_save) in
    /// place of the model's. All other tensors and files are copied unchanged.
    MergeLora(merge_lora::Options),
}

pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::LorasToComol(options) => loras_to_comol::run(options),
        Command::MoeLoraToComol(options) => moe_lora_to_comol::run(options),
        Command::MoeToLatent(options) => moe_to_latent::run(options),
        Command::DenseToMoe(options) => dense_to_moe::run(options),
        Command::MergeLora(options) => merge_lora::run(options),
    }
}
