//! Layers: what a model is made of. A layer is a description; [`forward`](Lora::forward) adds its operations and
//! parameters to a graph.

mod adapter;
mod comol;
mod feed_forward;
mod latent_moe;
mod linear;
mod lora;
mod moe;
mod moe_lora;
mod rotmole;
mod routing;

pub use adapter::{AdapterOptions, AdapterScale};
pub use comol::{CoMol, CoMolOutput, CoreRouting, DecoderWidths};
pub use feed_forward::{FeedForward, SharedExpert};
pub use latent_moe::LatentMoe;
pub use linear::Linear;
pub use lora::Lora;
pub use moe::Moe;
pub use moe_lora::MoeLora;
pub use rotmole::{GateInput, RotMole};
pub use routing::{Capacity, RotatedLatents, RoutedOutput, RouterOutput, Routing};
