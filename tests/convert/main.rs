//! Conversions of one kind of mixture into another.

mod core;
#[cfg(feature = "cli")]
mod core_program;
