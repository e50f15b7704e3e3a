//! Checkpoints of mixtures of experts: the layouts of other projects, and ours of latent experts.

mod weights;

pub use self::weights::{LatentDown, LatentExperts, MoeExperts};
