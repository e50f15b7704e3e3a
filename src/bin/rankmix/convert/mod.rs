//! `rankmix convert`.

mod moe_to_latent;

use std::process::ExitCode;

use clap::Subcommand;
use rankmix::Result;

/// What to make out of what.
#[derive(Debug, Subcommand)]
pub(crate) enum Conversion {
    /// Make the mixtures of experts of a model into latent experts, which share their projections by groups (MoLE).
    MoeToLatent(moe_to_latent::Options),
}

pub(crate) fn run(conversion: Conversion) -> Result<ExitCode> {
    match conversion {
        Conversion::MoeToLatent(options) => moe_to_latent::run(options),
    }
}
