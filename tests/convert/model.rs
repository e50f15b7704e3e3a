//! Whole models, written by the tests themselves and converted.

mod damaged;
mod families;
/// The program itself is started, and killed.
#[cfg(all(unix, feature = "cli"))]
mod killed;
/// Links and sockets.
#[cfg(unix)]
mod links;
#[cfg(feature = "cli")]
mod program;
mod resumed;
mod sparse_layers;
mod written;
