//! The tiles of `shaders/parts/subgroup_tile.wgsl`, in which products go on software adapters.

use crate::device::{AdapterClass, Capabilities};

/// Rows and columns of the result that a subgroup computes.
pub(crate) const SUBGROUP_TILE: usize = 32;

/// Whether the tiles suit the device.
pub(crate) fn subgroup_tiles(capabilities: &Capabilities) -> bool {
    capabilities.class == AdapterClass::Software && capabilities.subgroup_size == Some(8)
}
