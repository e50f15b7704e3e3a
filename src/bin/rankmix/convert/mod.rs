//! `rankmix convert`.

mod dense_to_moe;
mod moe_to_latent;

use std::process::ExitCode;

use rankmix::Result;

/// What to make of what.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make the mixtures of experts of a model into latent experts, which share their projections by groups (MoLE).
    MoeToLatent(moe_to_latent::Options),
    /// Make the dense feed-forwards of a model into mixtures of experts.
    DenseToMoe(dense_to_moe::Options),
}

pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::MoeToLatent(options) => moe_to_latent::run(options),
        Command::DenseToMoe(options) => dense_to_moe::run(options),
    }
}
