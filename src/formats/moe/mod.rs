//! Checkpoints of mixtures of experts: the layouts of other projects, and ours of latent experts.

mod config;
mod export;
mod latent;
mod layout;
mod load;
mod model;
mod scan;
mod sparse_layers;
mod weights;

#[cfg(feature = "convert")]
pub(crate) use self::config::LATENT_KEY;
pub use self::config::{LATENT_LAYOUT_VERSION, LatentConfig, MoeConfig};
pub use self::export::NamedMatrix;
#[cfg(feature = "convert")]
pub(crate) use self::export::expert_shapes;
#[cfg(feature = "convert")]
pub(crate) use self::latent::latent_parts;
pub use self::layout::MoeLayout;
pub use self::model::{MoeModel, SharedMatrices};
pub use self::scan::{LatentLayer, MoeLayer};
pub use self::weights::{LatentDown, LatentExperts, MoeExperts};
