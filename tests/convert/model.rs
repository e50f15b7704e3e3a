//! Whole models, written by the tests themselves and converted.

mod damaged;
mod families;
/// The program itself is started, and killed.
#[cfg(all(unix, feature = "cli"))]
mod killed;
#[cfg(feature = "cli")]
mod program;
mod sparse_layers;
mod written;
