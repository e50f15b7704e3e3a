//! Making one kind of mixture out of another: an MoE into latent experts, LoRAs into core experts, a dense feed-forward into an MoE.

mod core;

pub use self::core::{
    CoreExpertReport, CoreLayerReport, CoreReport, CoreRouter, DistillOptions, LoraOptions,
    loras_to_comol, moe_lora_to_comol,
};
