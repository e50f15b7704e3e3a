//! What all low-rank adapters have in common.

use crate::error::{Error, Result};
use crate::layers::Linear;

/// How alpha becomes the factor in front of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AdapterScale {
    /// `alpha / rank`.
    #[default]
    Standard,
    /// `alpha / √rank` (rsLoRA).
    RankStabilized,
}

/// Rank and scale of a low-rank adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterOptions {
    /// The rank.
    pub rank: usize,
    /// Alpha: the adapter is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// What that becomes.
    pub scale: AdapterScale,
}

impl AdapterOptions {
    /// A rank and an alpha, the factor being `alpha / rank`.
    #[must_use]
    pub fn new(rank: usize, alpha: f32) -> Self {
        Self {
            rank,
            alpha,
            scale: AdapterScale::Standard,
        }
    }

    /// The factor in front of the adapter.
    #[must_use]
    pub fn factor(&self) -> f32 {
        match self.scale {
            AdapterScale::Standard => self.alpha / self.rank as f32,
            AdapterScale::RankStabilized => self.alpha / (self.rank as f32).sqrt(),
        }
    }

    pub(crate) fn check(&self, base: &Linear) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting(
                "rank",
                self.rank,
                "an adapter needs at least rank 1",
            ));
        }
        if !self.alpha.is_finite() {
            return Err(Error::setting("alpha", self.alpha, "must be finite"));
        }
        if base.d_in == 0 || base.d_out == 0 {
            return Err(Error::setting(
                "d_in, d_out",
                format!("{}, {}", base.d_in, base.d_out),
                "must be at least 1",
            ));
        }
        Ok(())
    }
}
