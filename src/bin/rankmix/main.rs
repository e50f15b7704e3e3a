//! The `rankmix` program: what devices there are, whether they compute what they should, and how fast.

#[macro_use]
mod output;

mod convert;
mod devices;
mod inspect;
mod replay;
mod roofline;
mod time;
mod tune;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use rankmix::device::TunedKernels;
use rankmix::{Device, DeviceOptions, Precision, Result, Storage};

/// Mixtures of low-rank experts on any GPU.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the adapters of this machine with their limits and features.
    Devices,
    /// Say what is in a file or folder: tensors, shapes, element types, metadata, adapters.
    Inspect(inspect::Options),
    /// Make one kind of mixture out of another.
    #[command(subcommand)]
    Convert(convert::Command),
    /// Replay golden cases and compare outputs and gradients. Exits with 1 if any fails.
    Replay(replay::Options),
    /// Time a layer, forward and forward plus backward.
    Time(time::Options),
    /// Measure the device's own limits, and how far operations and layers are from them.
    Roofline(roofline::Options),
    /// Measure which kernels are the fastest on this adapter for a layer, and keep the choice in a file.
    Tune(tune::Options),
}

/// Which device a command runs on.
#[derive(Debug, clap::Args)]
struct DeviceArguments {
    /// `cpu`, `vulkan`, `metal`, `dx12`, `gl`, or part of an adapter's name [default: RANKMIX_DEVICE, or the best there is]
    #[arg(long, value_name = "D")]
    device: Option<String>,
    /// Keep bounds checks in the kernels and look for NaN and infinity after every operation.
    #[arg(long)]
    checked: bool,
    /// Take the kernels that `rankmix tune` has found the fastest on this adapter [default: RANKMIX_KERNELS, or the built-in rules]
    #[arg(long, value_name = "FILE")]
    kernels: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StorageChoice {
    /// 32 bits.
    F32,
    /// Parameters and activations in 16 bits.
    F16,
    /// Parameters in 16 bits.
    F16Parameters,
    /// Activations in 16 bits.
    F16Activations,
}

/// What floats are stored in; arithmetic is f32 always.
#[derive(Debug, clap::Args)]
struct StorageArguments {
    /// What floats are stored in.
    #[arg(long, value_enum, value_name = "S", default_value = "f32")]
    storage: StorageChoice,
}

impl StorageArguments {
    fn precision(&self) -> Precision {
        use StorageChoice::{F16, F16Activations, F16Parameters};
        let half = |chosen: [StorageChoice; 2]| {
            if chosen.contains(&self.storage) {
                Storage::F16
            } else {
                Storage::F32
            }
        };
        Precision {
            parameters: half([F16, F16Parameters]),
            activations: half([F16, F16Activations]),
        }
    }
}

impl DeviceArguments {
    fn open(&self) -> Result<Device> {
        Device::open_with(&DeviceOptions {
            request: self.device.clone(),
            checked: self.checked,
            kernels: self.kernels.as_ref().map(TunedKernels::load).transpose()?,
            ..DeviceOptions::default()
        })
    }
}

fn main() -> ExitCode {
    let done = match Program::parse().command {
        Command::Devices => devices::run().map(|()| ExitCode::SUCCESS),
        Command::Inspect(options) => inspect::run(&options),
        Command::Convert(command) => convert::run(&command),
        Command::Replay(options) => replay::run(&options),
        Command::Time(options) => time::run(&options),
        Command::Roofline(options) => roofline::run(&options),
        Command::Tune(options) => tune::run(options),
    };
    done.unwrap_or_else(|error| {
        eprintln!("rankmix: {error}");
        ExitCode::from(2)
    })
}
