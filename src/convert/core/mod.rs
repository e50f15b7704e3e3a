//! LoRAs as core experts: several adapters, or the experts of a mixture, between one shared A and B (the end of section 5 of the mathematics).
//!
//! The changes of a weight, `X_i = s_i B_i A_i`, are brought into one pair of bases: U from the singular vectors of all B, V from those of
//! all A, each weighted by what the other does to it, so that how a change is split between its A and its B makes no difference. The core that
//! acts as `Uᵀ X_i V` loses nothing if the bases are as wide as the ranks together; narrower ones keep the most energy.

mod bases;
mod distill;
mod folder;
mod loras;
mod report;

pub use distill::{DistillOptions, moe_lora_to_comol};
pub use folder::{check_comol_folder, write_comol};
pub use loras::{CoreRouter, LoraOptions, loras_to_comol};
pub use report::{CoreExpertReport, CoreLayerReport, CoreReport};
