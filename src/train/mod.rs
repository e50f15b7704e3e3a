//! Training: optimisers, gradient accumulation, learning-rate schedules.

mod accumulation;
mod adamw;
mod schedule;

pub use accumulation::{Accumulated, AccumulatedUpdate, GradientAccumulation};
pub use adamw::{AdamW, Optimizer};
pub use schedule::Schedule;
