//! An MoE into latent experts.

mod calibration;
mod facts;
mod grouping;
mod layer;
mod mistakes;
