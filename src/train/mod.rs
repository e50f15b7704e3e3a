//! Training: optimisers, learning-rate schedules.

mod adamw;
mod loss_scaling;
mod schedule;

pub use crate::ops::LossScaling;
pub use adamw::{AdamW, Optimizer};
pub use schedule::Schedule;
