//! Conversions of one kind of mixture into another, on matrices and on files.

mod dense;
mod dense_model;
mod latent;
mod model;
mod random;
