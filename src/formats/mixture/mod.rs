//! Our layout for mixtures of LoRA experts: a folder like PEFT's, with a gate and several experts a layer. docs/formats.md has the tables.

mod adapter;
mod export;
mod layer;
mod moe_peft;
mod moe_peft_config;
mod options;
mod read;
mod write;

pub use adapter::MixtureAdapter;
pub use layer::{MixtureKind, MixtureLayer};
pub use moe_peft::MoePeftAdapter;
pub(crate) use moe_peft_config::MoePeftConfig;
pub(crate) use read::MixtureConfig;

/// What `format` says.
const FORMAT: &str = "rankmix";
/// The version of the layout that is written, and the only one that is read.
const FORMAT_VERSION: u64 = 1;
/// The end of the name of a gate, here and in MoE-PEFT: the tensor that every layer of every kind has.
const GATE: &str = ".moe_gate.weight";
