//! Conversions between kinds of mixtures, and of whole models on disk.

/// Whole models, written by the tests themselves.
mod model {
    mod damaged;
    mod families;
    /// The program itself is started, and killed.
    #[cfg(all(unix, feature = "cli"))]
    mod killed;
    mod written;
}
