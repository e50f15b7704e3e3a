//! Training: optimisers, gradient accumulation, learning-rate schedules.

mod accumulation;
mod adamw;
mod loss_scaling;
mod schedule;

pub use crate::ops::LossScaling;
pub use accumulation::{Accumulated, AccumulatedUpdate, GradientAccumulation};
pub use adamw::{AdamW, Optimizer};
pub use schedule::Schedule;
