//! Layers: what a model is made of. A layer is a description; [`forward`](Lora::forward) adds its operations and
//! parameters to a graph.

mod adapter;
mod comol;
mod linear;
mod lora;
mod moe_lora;
mod rotmole;

pub use adapter::{AdapterOptions, AdapterScale};
pub use comol::{CoMol, CoMolOutput, CoreRouting, DecoderWidths};
pub use linear::Linear;
pub use lora::Lora;
pub use moe_lora::{MoeLora, RoutedOutput, RouterOptions};
pub use rotmole::{GateInput, RotMole};
