//! Conversions of one kind of mixture into another, on matrices and on files.

mod latent;
mod model;
mod random;
