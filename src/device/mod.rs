//! Devices: a GPU through wgpu, or the CPU. This folder is the only place that names wgpu.

mod adapter;
mod capabilities;
mod counters;
mod gpu;
mod half;
mod kernel_choices;
mod launch;
mod notice;
mod once;
#[cfg(not(target_arch = "wasm32"))]
mod pipeline_file;
mod pipelines;
mod profile;
mod recording;
mod reports;

use std::path::PathBuf;
use std::sync::Arc;

pub use adapter::AdapterSummary;
use adapter::Request;
pub use capabilities::{AdapterClass, Capabilities};
pub use counters::Counters;
pub(crate) use gpu::{BUFFER_ALIGNMENT, Buffer, Gpu};
pub(crate) use half::{Element, HalfForm, element_of, is_integers, with_halves};
pub use kernel_choices::{KernelChoices, TunedKernels};
pub use launch::{Access, Binding, Launch, Launches, Shader, Slot, Word};
use notice::notice;
pub use profile::LaunchTiming;
pub(crate) use recording::{Bound, Recording};
pub use wgpu::{Buffer as HostBuffer, CommandEncoder};

use crate::error::{Error, Result};

/// The environment variable that picks a device.
pub const DEVICE_VARIABLE: &str = "RANKMIX_DEVICE";
/// The environment variable that names a file of [`TunedKernels`] for the devices that this crate opens.
pub const KERNELS_VARIABLE: &str = "RANKMIX_KERNELS";

/// The environment variable that names the folder of compiled pipelines, see [`DeviceOptions::pipeline_cache`].
pub const PIPELINE_CACHE_VARIABLE: &str = "RANKMIX_PIPELINE_CACHE";

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// `cpu`, `vulkan`, `metal`, `dx12`, `gl`, `webgpu`, or part of an adapter's name. `None`: what `RANKMIX_DEVICE` says, or
    /// else the best there is.
    pub request: Option<String>,
    /// Checked mode: kernels keep WGSL's bounds checks, and after every operation its results are scanned for NaN and
    /// infinity ([`Error::NotFinite`]). About twice the launches; for finding mistakes, not for training: an overflow that loss scaling would
    /// skip is an error too.
    pub checked: bool,
    /// A folder in which the driver's compiled pipelines are kept from one process to the next, a file for each adapter. `None`: the one
    /// that `RANKMIX_PIPELINE_CACHE` names, or else none. The file is read when the device opens, and written by [`Device::save_pipelines`]
    /// and when the device is dropped, each time whole or not at all; of several processes the last one's stays. One that is damaged, cut short, or of another
    /// adapter or driver is left unused, with one line on stderr. Only Vulkan's drivers give their pipelines out: on other
    /// backends, in browsers and on devices of a host application nothing is read or written. Drivers run what is in the file: the folder must be as
    /// safe from others as the program itself.
    pub pipeline_cache: Option<PathBuf>,
    /// Kernels that were measured to be the fastest on this adapter or others. `None`: those of the file that `RANKMIX_KERNELS` names, if
    /// there is one.
    pub kernels: Option<TunedKernels>,
}

/// Where sessions run: a GPU, or the CPU executor. Cheap to clone; clones share the device.
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Gpu(Arc<Gpu>),
    Host { float: HostFloat, checked: bool },
}

/// The float type that the CPU executor computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostFloat {
    F32,
    F64,
}

/// To be asked before waiting for a list of adapters.
fn may_find_adapters(call: &'static str, instead: &'static str) -> Result<()> {
    if cfg!(target_arch = "wasm32") {
        return Err(Error::WouldBlock { call, instead });
    }
    Ok(())
}

impl Device {
    /// The best device on this machine: the adapter that `RANKMIX_DEVICE` names, or else a discrete GPU, an integrated one, a
    /// software driver; and with no adapter at all the CPU executor, which says so in one line on stderr.
    ///
    /// # Errors
    /// [`Error::UnknownDevice`] or [`Error::NoAdapter`] if `RANKMIX_DEVICE` asks for what is not there, or the driver refuses;
    /// [`Error::File`] or [`Error::Format`] if `RANKMIX_KERNELS` names a file that cannot be read; [`Error::WouldBlock`] in a browser.
    pub fn open() -> Result<Self> {
        Self::open_with(&DeviceOptions::default())
    }

    /// [`Device::open`] with options.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_with(options: &DeviceOptions) -> Result<Self> {
        may_find_adapters("Device::open", "Device::open_async")?;
        pollster::block_on(Self::open_async(options))
    }

    /// [`Device::open_with`] for an async caller; the only way in a browser.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub async fn open_async(options: &DeviceOptions) -> Result<Self> {
        let text = options
            .request
            .clone()
            .or_else(|| std::env::var(DEVICE_VARIABLE).ok())
            .unwrap_or_default();
        let request = Request::parse(&text);
        let Some(adapter) = adapter::choose(&request).await? else {
            if request == Request::Best {
                notice(format_args!("no GPU adapter found, running on the CPU"));
            }
            return Ok(Self {
                kind: Kind::Host {
                    float: HostFloat::F32,
                    checked: options.checked,
                },
            });
        };
        let kernels = match (&options.kernels, std::env::var_os(KERNELS_VARIABLE)) {
            (Some(kernels), _) => kernels.clone(),
            (None, Some(path)) if !path.is_empty() => TunedKernels::load(PathBuf::from(path))?,
            _ => TunedKernels::default(),
        };
        let (device, queue, summary) = adapter::open(&adapter).await?;
        let choices = kernels.choices(&summary);
        let mut gpu = Gpu::new(device, queue, summary, options.checked, true);
        gpu.choose_kernels(choices);
        gpu.keep_pipelines(options.pipeline_cache.clone())?;
        Ok(Self {
            kind: Kind::Gpu(Arc::new(gpu)),
        })
    }

    /// The CPU executor, in 32-bit floats.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            kind: Kind::Host {
                float: HostFloat::F32,
                checked: false,
            },
        }
    }

    /// The CPU executor in 64-bit floats: what kernels are compared with. Slow; its results are [`DType::F64`](crate::DType).
    #[must_use]
    pub fn reference() -> Self {
        Self {
            kind: Kind::Host {
                float: HostFloat::F64,
                checked: false,
            },
        }
    }

    /// A device that the host application already has. Kernels keep to the limits and features it was created with, and
    /// the application's error handlers stay in place.
    ///
    /// # Errors
    /// [`Error::Limit`] if the device was created with fewer than the 8 storage buffers that WebGPU guarantees.
    pub fn from_wgpu(device: &wgpu::Device, queue: &wgpu::Queue, checked: bool) -> Result<Self> {
        let summary = adapter::summarise_device(device);
        let buffers = summary.capabilities.max_storage_buffers;
        if buffers < 8 {
            return Err(Error::Limit {
                thing: format!("the device `{}`", summary.name),
                needed: 8,
                limit: u64::from(buffers),
                unit: "storage buffers",
            });
        }
        let gpu = Gpu::new(device.clone(), queue.clone(), summary, checked, false);
        Ok(Self {
            kind: Kind::Gpu(Arc::new(gpu)),
        })
    }

    /// Every adapter on this machine that can run the kernels.
    ///
    /// # Errors
    /// [`Error::WouldBlock`] in a browser.
    pub fn list() -> Result<Vec<AdapterSummary>> {
        may_find_adapters("Device::list", "Device::list_async")?;
        Ok(pollster::block_on(adapter::list()))
    }

    /// [`Device::list`] for an async caller; a browser lists the one adapter that it gives to pages.
    pub async fn list_async() -> Vec<AdapterSummary> {
        adapter::list().await
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The adapter behind a GPU device; `None` for the CPU executor.
    #[must_use]
    pub fn adapter(&self) -> Option<&AdapterSummary> {
        match &self.kind {
            Kind::Gpu(gpu) => Some(&gpu.summary),
            Kind::Host { .. } => None,
        }
    }

    /// A line that says which device this is: `lavapipe ... (vulkan, software)` or `CPU executor (f32)`.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Gpu(gpu) => {
                let summary = &gpu.summary;
                format!(
                    "{} ({}, {})",
                    summary.name,
                    summary.backend,
                    summary.capabilities.class.name()
                )
            }
            Kind::Host {
                float: HostFloat::F32,
                ..
            } => "CPU executor (f32)".to_owned(),
            Kind::Host {
                float: HostFloat::F64,
                ..
            } => "CPU reference (f64)".to_owned(),
        }
    }

    /// Whether results are scanned and kernels bounds-checked.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.checked,
            Kind::Host { checked, .. } => *checked,
        }
    }

    /// Writes the compiled pipelines to the folder of [`DeviceOptions::pipeline_cache`]; whether there was something new to write. `false`
    /// where there is no such folder or the driver gives no pipelines out. Dropping the device's last clone does the same.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written.
    pub fn save_pipelines(&self) -> Result<bool> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.save_pipelines(),
            Kind::Host { .. } => Ok(false),
        }
    }

    /// The kernels that operations take on this device where they have a choice; empty for the CPU executor.
    #[must_use]
    pub fn kernels(&self) -> KernelChoices {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.capabilities().kernels,
            Kind::Host { .. } => KernelChoices::default(),
        }
    }

    /// Lets the graphs that are compiled from now on take these kernels where operations have a choice. Without effect on the CPU executor.
    pub fn choose_kernels(&self, choices: KernelChoices) {
        if let Kind::Gpu(gpu) = &self.kind {
            gpu.choose_kernels(choices);
        }
    }

    /// What the device has done so far. All zeros for the CPU executor.
    #[must_use]
    pub fn counters(&self) -> Counters {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.counters.read(),
            Kind::Host { .. } => Counters::default(),
        }
    }

    /// Waits until everything submitted so far is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] if the device was lost meanwhile, [`Error::WouldBlock`] in a browser.
    pub fn wait(&self) -> Result<()> {
        self.may_wait("Device::wait", "Device::wait_async")?;
        match &self.kind {
            Kind::Gpu(gpu) => gpu.wait(),
            Kind::Host { .. } => Ok(()),
        }
    }

    /// [`Device::wait`] for an async caller.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] if the device was lost meanwhile; in a browser any error of a call that could not report it itself.
    pub async fn wait_async(&self) -> Result<()> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.done().await,
            Kind::Host { .. } => Ok(()),
        }
    }

    /// In a browser waits for wgpu's reports of all calls so far, and returns the first error among them; natively each call has returned its own.
    pub(crate) async fn settle(&self) -> Result<()> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.settle().await,
            Kind::Host { .. } => Ok(()),
        }
    }

    /// Whether both are the same device, whose memory sessions of either can use.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Gpu(one), Kind::Gpu(other)) => Arc::ptr_eq(one, other),
            (Kind::Host { float: one, .. }, Kind::Host { float: other, .. }) => one == other,
            _ => false,
        }
    }

    /// To be asked before anything that waits for the device: in a browser only the CPU executor may, which never has to.
    pub(crate) fn may_wait(&self, call: &'static str, instead: &'static str) -> Result<()> {
        match self.kind {
            Kind::Gpu(_) if cfg!(target_arch = "wasm32") => {
                Err(Error::WouldBlock { call, instead })
            }
            _ => Ok(()),
        }
    }
}
