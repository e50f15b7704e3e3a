//! The cases, one file for each family of operations.

mod arithmetic;

use super::case::Case;

/// Every case there is.
pub fn all() -> Vec<Case> {
    [arithmetic::cases()].into_iter().flatten().collect()
}
