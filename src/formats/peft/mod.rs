//! LoRA adapters in the folders that PEFT writes: `adapter_config.json` and `adapter_model.safetensors`.

mod adapter;
mod config;
mod experts;
mod merge;

pub use adapter::{LoraPair, PeftAdapter, Target};
pub use config::LoraConfig;
pub use experts::{ExpertOrientation, FusedExperts};
