//! The cases, one file for each family of operations.

mod arithmetic;
mod grouped;
mod products;

use super::case::Case;

/// Every case there is.
pub fn all() -> Vec<Case> {
    [arithmetic::cases(), products::cases(), grouped::cases()].into_iter().flatten().collect()
}
