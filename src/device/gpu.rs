//! An open GPU: buffers, uploads, readback, and the translation of wgpu's errors into ours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::adapter::AdapterSummary;
use crate::device::counters::LiveCounters;
use crate::device::pipelines::PipelineCache;
use crate::error::{Error, Result};

/// Buffers are bound as arrays of up to 16-byte elements: sizes are multiples of that.
pub(crate) const BUFFER_ALIGNMENT: u64 = 16;

/// What went wrong outside any call of ours, kept until the next call can report it.
#[derive(Debug, Default)]
pub(crate) struct Faults {
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

#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) summary: AdapterSummary,
    /// Pipelines keep WGSL's bounds checks, workgroup memory starts at zero, and sessions scan every value for NaN.
    pub(crate) checked: bool,
    pub(crate) pipelines: PipelineCache,
    pub(crate) counters: Arc<LiveCounters>,
    faults: Arc<Faults>,
}

/// Device memory, freed when its last owner is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Buffer(Arc<BufferInner>);

#[derive(Debug)]
struct BufferInner {
    raw: wgpu::Buffer,
    /// `None` for a buffer that belongs to the host application.
    owner: Option<Arc<LiveCounters>>,
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        if let Some(counters) = &self.owner {
            counters.freed(self.raw.size());
        }
    }
}

impl Buffer {
    pub(crate) fn raw(&self) -> &wgpu::Buffer {
        &self.0.raw
    }

    /// A buffer that the host application owns.
    pub(crate) fn foreign(raw: wgpu::Buffer) -> Self {
        Self(Arc::new(BufferInner { raw, owner: None }))
    }
}

impl Gpu {
    pub(crate) fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        summary: AdapterSummary,
        checked: bool,
        ours: bool,
    ) -> Self {
        let faults = Arc::new(Faults::default());
        // A host application keeps its own handlers.
        if ours {
            let recorder = Arc::clone(&faults);
            device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                recorder.record(error.to_string());
            }));
            let recorder = Arc::clone(&faults);
            device.set_device_lost_callback(move |_, message| {
                recorder.record(message);
                recorder.lost.store(true, Ordering::Release);
            });
        }
        Self {
            device,
            queue,
            summary,
            checked,
            pipelines: PipelineCache::default(),
            counters: Arc::default(),
            faults,
        }
    }

    /// On GL all calls go through one context: wgpu panics if a thread waits for it longer than 6 seconds, which one long shader
    /// compilation is enough for. Our own threads wait here instead.
    fn exclusive(&self) -> Option<MutexGuard<'static, ()>> {
        static GL: Mutex<()> = Mutex::new(());
        self.is_gl()
            .then(|| GL.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn is_gl(&self) -> bool {
        self.summary.backend == "gl"
    }

    /// The error that happened outside a call of ours, if one did.
    pub(crate) fn fault(&self) -> Result<()> {
        if self.faults.lost.load(Ordering::Acquire) {
            let message = self
                .faults
                .message
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            return Err(Error::DeviceLost {
                reason: message.clone().unwrap_or_default(),
            });
        }
        match self
            .faults
            .message
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            Some(reason) => Err(Error::Gpu {
                thing: "the device".to_owned(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Runs `action` and turns what wgpu reports of it into an error.
    #[cfg(not(target_arch = "wasm32"))]
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
        // Natively these futures are ready at once.
        let validation = pollster::block_on(validation.pop());
        let memory = pollster::block_on(memory.pop());
        let internal = pollster::block_on(internal.pop());
        self.fault()?;
        if memory.is_some() {
            return Err(Error::OutOfMemory {
                thing: thing.to_owned(),
                bytes,
            });
        }
        match validation.or(internal) {
            Some(error) => Err(Error::Gpu {
                thing: thing.to_owned(),
                reason: error.to_string(),
            }),
            None => Ok(made),
        }
    }

    /// In a browser an error arrives later, through the handler, and is reported by the next call.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn scoped<T>(
        &self,
        _thing: &str,
        _bytes: u64,
        action: impl FnOnce() -> T,
    ) -> Result<T> {
        self.fault()?;
        Ok(action())
    }

    /// New device memory. Its contents are zeros.
    pub(crate) fn allocate(&self, thing: &str, bytes: u64) -> Result<Buffer> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        let limits = &self.summary.capabilities;
        let limit = limits.max_binding_bytes.min(limits.max_buffer_bytes);
        self.create(thing, bytes, usage, limit)
    }

    pub(crate) fn create(
        &self,
        thing: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        limit: u64,
    ) -> Result<Buffer> {
        let size = bytes.max(1).next_multiple_of(BUFFER_ALIGNMENT);
        if size > limit {
            return Err(Error::Limit {
                thing: thing.to_owned(),
                needed: size,
                limit,
                unit: "bytes in one buffer",
            });
        }
        let descriptor = wgpu::BufferDescriptor {
            label: Some(thing),
            size,
            usage,
            mapped_at_creation: false,
        };
        let raw = self.scoped(thing, size, || self.device.create_buffer(&descriptor))?;
        self.counters.allocated(size);
        Ok(Buffer(Arc::new(BufferInner {
            raw,
            owner: Some(Arc::clone(&self.counters)),
        })))
    }

    /// A buffer that the host can map to read what was copied into it.
    pub(crate) fn staging(&self, bytes: u64) -> Result<Buffer> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        self.create(
            "a readback buffer",
            bytes,
            usage,
            self.summary.capabilities.max_buffer_bytes,
        )
    }

    /// Copies host bytes (a multiple of 4) to the start of a buffer, before the next submission.
    pub(crate) fn write(&self, buffer: &Buffer, bytes: &[u8]) {
        self.queue.write_buffer(buffer.raw(), 0, bytes);
    }

    pub(crate) fn submit(&self, thing: &str, encoder: wgpu::CommandEncoder) -> Result<()> {
        LiveCounters::count(&self.counters.submits, 1);
        self.scoped(thing, 0, || {
            self.queue.submit([encoder.finish()]);
        })
    }

    /// Waits until the device has done all that was submitted.
    pub(crate) fn wait(&self) -> Result<()> {
        let _exclusive = self.exclusive();
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|error| Error::DeviceLost {
                reason: error.to_string(),
            })?;
        self.fault()
    }

    /// Reads the first `bytes` of a staging buffer once the copy into it is done. The blocking half of the work
    /// is `poll`: natively the caller's thread does it, in a browser the event loop.
    pub(crate) async fn map(&self, staging: &Buffer, bytes: u64, poll: bool) -> Result<Vec<u8>> {
        let slice = staging.raw().slice(0..bytes.next_multiple_of(4));
        let (sender, receiver) = crate::device::once::channel();
        // On a lost device the buffer is invalid, and the callback may never be called: the scope returns first.
        self.scoped("reading a buffer back", bytes, || {
            slice.map_async(wgpu::MapMode::Read, move |outcome| sender.send(outcome));
        })?;
        if poll {
            self.wait()?;
        }
        receiver.await.map_err(|error| {
            self.fault().err().unwrap_or(Error::Gpu {
                thing: "reading a buffer back".to_owned(),
                reason: error.to_string(),
            })
        })?;
        let mapped = slice.get_mapped_range().map_err(|error| Error::Gpu {
            thing: "reading a buffer back".to_owned(),
            reason: error.to_string(),
        });
        let contents = mapped.map(|view| view[..bytes as usize].to_vec());
        staging.raw().unmap();
        contents
    }

    /// Copies the first `bytes` of a buffer to the host, in a submission of its own.
    pub(crate) async fn read(&self, buffer: &Buffer, bytes: u64, poll: bool) -> Result<Vec<u8>> {
        let staging = self.staging(bytes)?;
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(
            buffer.raw(),
            0,
            staging.raw(),
            0,
            Some(bytes.next_multiple_of(4)),
        );
        self.submit("reading a buffer back", encoder)?;
        self.map(&staging, bytes, poll).await
    }
}
