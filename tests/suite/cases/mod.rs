//! The cases, one file for each family of operations.

mod arithmetic;
mod cores;
mod experts;
mod grouped;
mod model_parts;
mod noise;
mod products;
mod rotation;
mod routing;
mod tiles;

use crate::case::Case;

/// Every case there is.
pub fn all() -> Vec<Case> {
    [
        arithmetic::cases(),
        cores::cases(),
        products::cases(),
        grouped::cases(),
        experts::cases(),
        model_parts::cases(),
        noise::cases(),
        rotation::cases(),
        routing::cases(),
        tiles::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
