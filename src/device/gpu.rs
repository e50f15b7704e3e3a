//! An open GPU: buffers, uploads, readback.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::adapter::AdapterSummary;
use crate::device::capabilities::Capabilities;
use crate::device::counters::LiveCounters;
use crate::device::kernel_choices::KernelChoices;
use crate::device::once;
use crate::device::pipelines::PipelineCache;
use crate::device::reports::Reports;
use crate::error::{Error, Result};

/// How often a browser that refused a call is asked for more before its device is taken to be there.
const LOSS_ROUND_TRIPS: usize = 16;

/// Buffers are bound as arrays of up to 16-byte elements: sizes are multiples of that.
pub(crate) const BUFFER_ALIGNMENT: u64 = 16;

#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) summary: AdapterSummary,
    /// Pipelines keep WGSL's bounds checks, workgroup memory starts at zero, and sessions scan every value for NaN.
    pub(crate) checked: bool,
    pub(crate) pipelines: PipelineCache,
    pub(crate) counters: Arc<LiveCounters>,
    pub(crate) reports: Reports,
    kernels: Mutex<KernelChoices>,
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
            // wgpu leaves the memory to the browser's garbage collector, which does not know how much it is. What was submitted is still done.
            if cfg!(target_arch = "wasm32") {
                self.raw.destroy();
            }
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

/// A staging buffer that is being mapped. It is free for the next copy when this is dropped, even if nobody awaited the contents.
#[derive(Debug)]
pub(crate) struct Mapping {
    staging: Buffer,
    bytes: u64,
    outcome: once::Receiver<Result<(), wgpu::BufferAsyncError>>,
    failed: bool,
}

impl Mapping {
    async fn contents(mut self) -> Result<Vec<u8>> {
        let refused = |reason: String| Error::Gpu {
            thing: "reading a buffer back".to_owned(),
            reason,
        };
        if let Err(error) = (&mut self.outcome).await {
            self.failed = true;
            return Err(refused(error.to_string()));
        }
        let mapped = self.staging.raw().slice(0..self.bytes.next_multiple_of(4));
        let view = mapped
            .get_mapped_range()
            .map_err(|error| refused(error.to_string()))?;
        Ok(view[..self.bytes as usize].to_vec())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.failed {
            self.staging.raw().unmap();
        }
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
        let reports = Reports::of(&device, ours);
        Self {
            device,
            queue,
            summary,
            checked,
            pipelines: PipelineCache::default(),
            counters: Arc::default(),
            reports,
            kernels: Mutex::default(),
        }
    }

    /// What operations choose their kernels by.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        Capabilities {
            kernels: kernels.clone(),
            ..self.summary.capabilities.clone()
        }
    }

    pub(crate) fn choose_kernels(&self, choices: KernelChoices) {
        *self.kernels.lock().unwrap_or_else(PoisonError::into_inner) = choices;
    }

    /// On GL all calls go through one context: wgpu panics if a thread waits for it longer than 6 seconds, which one long shader
    /// compilation is enough for. Our own threads wait here instead.
    pub(crate) fn exclusive(&self) -> Option<MutexGuard<'static, ()>> {
        static GL: Mutex<()> = Mutex::new(());
        self.is_gl()
            .then(|| GL.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn is_gl(&self) -> bool {
        self.summary.backend == "gl"
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
        self.reports.fault()
    }

    /// The same without blocking the thread; natively the application polls the device.
    pub(crate) async fn done(&self) -> Result<()> {
        let (sender, receiver) = once::channel();
        self.queue.on_submitted_work_done(move || sender.send(()));
        self.settle().await?;
        receiver.await;
        self.reports.fault()
    }

    /// Waits for the reports of all calls so far, and for a lost device to be known as such.
    pub(crate) async fn settle(&self) -> Result<()> {
        match self.reports.settle().await {
            Err(error) => Err(self.lost_or(error).await),
            settled => settled,
        }
    }

    /// The error that a lost device explains, if it is lost. A browser says so after calls have failed: Chromium by the time that its
    /// empty queue is done, Firefox some messages later.
    async fn lost_or(&self, error: Error) -> Error {
        if cfg!(target_arch = "wasm32") {
            for _ in 0..LOSS_ROUND_TRIPS {
                let (sender, receiver) = once::channel();
                self.queue.on_submitted_work_done(move || sender.send(()));
                receiver.await;
                if let Err(lost @ Error::DeviceLost { .. }) = self.reports.fault() {
                    return lost;
                }
            }
        }
        error
    }

    /// Asks for the first `bytes` of a staging buffer, to be read once the copy into it is done.
    pub(crate) fn map(&self, staging: &Buffer, bytes: u64) -> Result<Mapping> {
        let (sender, receiver) = once::channel();
        let range = 0..bytes.next_multiple_of(4);
        // On a lost device the buffer is invalid, and the callback may never be called: the scope returns first.
        self.scoped("reading a buffer back", bytes, || {
            let slice = staging.raw().slice(range);
            slice.map_async(wgpu::MapMode::Read, move |outcome| sender.send(outcome));
        })?;
        Ok(Mapping {
            staging: staging.clone(),
            bytes,
            outcome: receiver,
            failed: false,
        })
    }

    /// Reads what was mapped. The blocking half of the work is `poll`: natively the caller's thread does it, in a browser the
    /// event loop.
    pub(crate) async fn contents(
        &self,
        mappings: Vec<Mapping>,
        poll: bool,
    ) -> Result<Vec<Vec<u8>>> {
        if poll && !mappings.is_empty() {
            self.wait()?;
        }
        self.settle().await?;
        let mut contents = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            match mapping.contents().await {
                Ok(bytes) => contents.push(bytes),
                Err(error) => {
                    let error = self.lost_or(error).await;
                    self.reports.fault()?;
                    return Err(error);
                }
            }
        }
        Ok(contents)
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
        let mapping = self.map(&staging, bytes)?;
        Ok(self.contents(vec![mapping], poll).await?.remove(0))
    }
}
