//! What a device has done so far, counted on the host: tests rely on it to show that nothing is allocated or compiled after
//! the first run.

use std::sync::atomic::{AtomicU64, Ordering};

/// A reading of a device's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Buffers created.
    pub buffers: u64,
    /// Bytes in buffers now.
    pub bytes: u64,
    /// The most bytes there ever were in buffers at one time.
    pub peak_bytes: u64,
    /// Compute pipelines compiled.
    pub pipelines: u64,
    /// Bind groups created.
    pub bind_groups: u64,
    /// Command buffers submitted.
    pub submits: u64,
    /// Compute passes recorded.
    pub passes: u64,
    /// Kernels dispatched.
    pub launches: u64,
}

#[derive(Debug, Default)]
pub(crate) struct LiveCounters {
    pub(crate) buffers: AtomicU64,
    bytes: AtomicU64,
    peak_bytes: AtomicU64,
    pub(crate) pipelines: AtomicU64,
    pub(crate) bind_groups: AtomicU64,
    pub(crate) submits: AtomicU64,
    pub(crate) passes: AtomicU64,
    pub(crate) launches: AtomicU64,
}

impl LiveCounters {
    pub(crate) fn count(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn allocated(&self, bytes: u64) {
        Self::count(&self.buffers, 1);
        let now = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak_bytes.fetch_max(now, Ordering::Relaxed);
    }

    pub(crate) fn freed(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Counters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            buffers: load(&self.buffers),
            bytes: load(&self.bytes),
            peak_bytes: load(&self.peak_bytes),
            pipelines: load(&self.pipelines),
            bind_groups: load(&self.bind_groups),
            submits: load(&self.submits),
            passes: load(&self.passes),
            launches: load(&self.launches),
        }
    }
}
