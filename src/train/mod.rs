//! Training: optimisers, learning-rate schedules.

mod adamw;
mod schedule;

pub use adamw::{AdamW, Optimizer};
pub use schedule::Schedule;
