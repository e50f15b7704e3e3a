//! LoRA adapters in the folders that PEFT writes: `adapter_config.json` and `adapter_model.safetensors`.

mod adapter;
mod config;
mod experts;
mod merge;

pub use adapter::{LoraPair, PeftAdapter, Target};
pub(crate) use adapter::{PREFIX, Parts, floats, open_tensors, pair};
pub use config::LoraConfig;
pub(crate) use config::{CONFIG, MOST_RANK, without_effect};
pub use experts::{ExpertOrientation, FusedExperts};
