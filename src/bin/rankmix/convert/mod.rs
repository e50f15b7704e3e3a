//! `rankmix convert`.

mod loras_to_comol;
mod moe_lora_to_comol;
mod output;
mod summary;

use std::process::ExitCode;

use rankmix::Result;

/// What to make of what.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make several LoRA adapters the experts of one CoMoL adapter.
    LorasToComol(loras_to_comol::Options),
    /// Make a MoE-LoRA adapter (or RotMoLE, without its rotations, or MoLA) a CoMoL adapter.
    MoeLoraToComol(moe_lora_to_comol::Options),
}

pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::LorasToComol(options) => loras_to_comol::run(options),
        Command::MoeLoraToComol(options) => moe_lora_to_comol::run(options),
    }
}
