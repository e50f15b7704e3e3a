//! LoRA adapters in the folders that PEFT writes: `adapter_config.json` and `adapter_model.safetensors`.

mod adapter;
mod config;
mod experts;
pub(crate) mod folder;
mod merge;

pub use adapter::{LoraPair, PeftAdapter, Target};
pub(crate) use adapter::{PREFIX, Parts, factor, floats, pair};
pub use config::LoraConfig;
pub(crate) use config::{MOST_RANK, check_base, without_effect};
pub use experts::{ExpertOrientation, FusedExperts};
