//! Conversions of one kind of mixture into another, on matrices and on files.

mod core;
#[cfg(feature = "cli")]
mod core_program;
mod dense;
mod dense_model;
mod latent;
mod merge;
mod model;
mod random;
