//! What wgpu reports of our calls, turned into errors. Natively the report of a call is there when it returns. A browser's
//! arrives later: the call succeeds, and the next that is awaited returns the error.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::gpu::Gpu;
use crate::error::{Error, Result};

/// What went wrong outside any call of ours, kept until the next call can report it.
#[derive(Debug, Default)]
struct Faults {
    lost: AtomicBool,
    message: Mutex<Option<String>>,
}

impl Faults {
    fn record(&self, message: String) {
        self.message
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(message);
    }
}

/// The faults of a device, and in a browser the reports that are still to come.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    faults: Arc<Faults>,
    #[cfg(target_arch = "wasm32")]
    coming: coming::Coming,
    #[cfg(target_arch = "wasm32")]
    failed_late: AtomicBool,
}

impl Reports {
    /// Listens to a device. A host application's device (not `ours`) keeps its own handlers.
    pub(crate) fn of(device: &wgpu::Device, ours: bool) -> Self {
        let reports = Self::default();
        if ours {
            let faults = Arc::clone(&reports.faults);
            device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                faults.record(error.to_string());
            }));
        }
        // In a browser this is one listener of any number.
        if ours || cfg!(target_arch = "wasm32") {
            let faults = Arc::clone(&reports.faults);
            device.set_device_lost_callback(move |_, message| {
                faults.record(message);
                faults.lost.store(true, Ordering::Release);
            });
        }
        reports
    }

    /// The error that happened outside a call of ours, if one did.
    pub(crate) fn fault(&self) -> Result<()> {
        let mut message = self
            .faults
            .message
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.faults.lost.load(Ordering::Acquire) {
            return Err(Error::DeviceLost {
                reason: message.clone().unwrap_or_default(),
            });
        }
        match message.take() {
            Some(reason) => Err(Error::Gpu {
                thing: "the device".to_owned(),
                reason,
            }),
            None => Ok(()),
        }
    }
}

impl Gpu {
    /// Runs `action` and turns what wgpu reports of it into an error.
    pub(crate) fn scoped<T>(
        &self,
        thing: &str,
        bytes: u64,
        action: impl FnOnce() -> T,
    ) -> Result<T> {
        let _exclusive = self.exclusive();
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = action();
        let (validation, memory, internal) = (validation.pop(), memory.pop(), internal.pop());
        let thing = thing.to_owned();
        self.reports.heed(async move {
            let invalid = validation.await;
            if memory.await.is_some() {
                return Err(Error::OutOfMemory { thing, bytes });
            }
            // wgpu panics when it is told of a browser's internal error. What was to be made is invalid then, and its use says so.
            let error = match invalid {
                None if !cfg!(target_arch = "wasm32") => internal.await,
                found => found,
            };
            match error {
                Some(error) => Err(Error::Gpu {
                    thing,
                    reason: error.to_string(),
                }),
                None => Ok(()),
            }
        })?;
        Ok(made)
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl Reports {
    /// Natively a report is ready at once.
    fn heed(&self, report: impl Future<Output = Result<()>>) -> Result<()> {
        let found = pollster::block_on(report);
        self.fault()?;
        found
    }

    /// Waits for the reports of all calls so far.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.fault()
    }

    /// Whether an error came later than the call that made it, since this was last asked. Natively none does.
    pub(crate) fn failed_late(&self) -> bool {
        false
    }
}

#[cfg(target_arch = "wasm32")]
mod coming {
    use std::collections::VecDeque;
    use std::fmt;
    use std::pin::Pin;
    use std::sync::atomic::Ordering;
    use std::sync::{Mutex, PoisonError};
    use std::task::{Context, Poll, Waker};

    use super::Reports;
    use crate::error::Result;

    /// Reports that the browser has not given yet, oldest first.
    #[derive(Default)]
    pub(super) struct Coming(Mutex<VecDeque<Report>>);

    type Report = Pin<Box<dyn Future<Output = Result<()>>>>;

    impl fmt::Debug for Coming {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Coming")
        }
    }

    impl Reports {
        /// Keeps the report for whoever awaits next, and returns the first error among those that have come meanwhile: an application
        /// that never awaits learns of its errors, and their list does not grow.
        pub(super) fn heed(
            &self,
            report: impl Future<Output = Result<()>> + 'static,
        ) -> Result<()> {
            self.fault()?;
            let mut coming = self.coming.0.lock().unwrap_or_else(PoisonError::into_inner);
            coming.push_back(Box::pin(report));
            let mut context = Context::from_waker(Waker::noop());
            while let Some(oldest) = coming.front_mut() {
                let Poll::Ready(found) = oldest.as_mut().poll(&mut context) else {
                    break;
                };
                coming.pop_front();
                self.note(&found);
                found?;
            }
            Ok(())
        }

        fn note(&self, found: &Result<()>) {
            self.failed_late.fetch_or(found.is_err(), Ordering::AcqRel);
        }

        /// Whether an error came later than the call that made it, since this was last asked: what was made then is invalid,
        /// and must not be used again.
        pub(crate) fn failed_late(&self) -> bool {
            self.failed_late.swap(false, Ordering::AcqRel)
        }

        /// Waits for the reports of all calls so far. Those that come from calls of others meanwhile are theirs to await.
        pub(crate) async fn settle(&self) -> Result<()> {
            let coming =
                std::mem::take(&mut *self.coming.0.lock().unwrap_or_else(PoisonError::into_inner));
            let mut outcome = Ok(());
            for report in coming {
                let found = report.await;
                self.note(&found);
                outcome = outcome.and(found);
            }
            // A lost device explains whatever else there is.
            self.fault()?;
            outcome
        }
    }
}
