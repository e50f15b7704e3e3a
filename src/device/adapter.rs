//! Which adapters there are, which one is taken, and how it is opened.

use crate::device::capabilities::{AdapterClass, Capabilities};
use crate::device::kernel_choices::KernelChoices;
use crate::error::{Error, Result};

/// What is known of an adapter before it is opened.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// The adapter's name, as its driver gives it.
    pub name: String,
    /// `vulkan`, `metal`, `dx12`, `gl` or `webgpu`.
    pub backend: &'static str,
    /// The driver's name and version.
    pub driver: String,
    /// The smallest and the largest subgroup that the driver runs kernels in, if it has subgroups.
    pub subgroup_sizes: Option<[u32; 2]>,
    /// Limits and features.
    pub capabilities: Capabilities,
}

/// What the user asked for, in `RANKMIX_DEVICE` or by an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The best adapter, or the CPU executor where there is none.
    Best,
    /// The CPU executor.
    Cpu,
    /// The best adapter of a backend.
    Backend(&'static str),
    /// The first adapter whose name holds this text, whatever its case.
    Named(String),
}

const BACKENDS: [(&str, wgpu::Backends, wgpu::Backend); 5] = [
    ("vulkan", wgpu::Backends::VULKAN, wgpu::Backend::Vulkan),
    ("metal", wgpu::Backends::METAL, wgpu::Backend::Metal),
    ("dx12", wgpu::Backends::DX12, wgpu::Backend::Dx12),
    ("gl", wgpu::Backends::GL, wgpu::Backend::Gl),
    (
        "webgpu",
        wgpu::Backends::BROWSER_WEBGPU,
        wgpu::Backend::BrowserWebGpu,
    ),
];

impl Request {
    pub(crate) fn parse(text: &str) -> Self {
        let lower = text.trim().to_ascii_lowercase();
        if lower.is_empty() {
            return Self::Best;
        }
        if lower == "cpu" {
            return Self::Cpu;
        }
        BACKENDS
            .iter()
            .find(|(name, ..)| *name == lower)
            .map_or(Self::Named(lower), |(name, ..)| Self::Backend(name))
    }
}

fn backend_name(backend: wgpu::Backend) -> &'static str {
    BACKENDS
        .iter()
        .find(|(.., b)| *b == backend)
        .map_or("noop", |(name, ..)| name)
}

fn class_of(info: &wgpu::AdapterInfo) -> AdapterClass {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterClass::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterClass::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterClass::Virtual,
        wgpu::DeviceType::Cpu => AdapterClass::Software,
        // GL has no way to say it: Mesa's software rasterisers are known by name.
        wgpu::DeviceType::Other => {
            let name = info.name.to_ascii_lowercase();
            if ["llvmpipe", "softpipe", "swiftshader"]
                .iter()
                .any(|software| name.contains(software))
            {
                AdapterClass::Software
            } else {
                AdapterClass::Other
            }
        }
    }
}

pub(crate) fn capabilities_of(
    info: &wgpu::AdapterInfo,
    limits: &wgpu::Limits,
    features: wgpu::Features,
) -> Capabilities {
    let subgroups = features.contains(wgpu::Features::SUBGROUP);
    let one_size = subgroups && info.subgroup_min_size == info.subgroup_max_size;
    Capabilities {
        class: class_of(info),
        max_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
        max_invocations_per_workgroup: limits.max_compute_invocations_per_workgroup,
        max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
        max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        uniform_alignment: limits.min_uniform_buffer_offset_alignment,
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroups,
        subgroup_size: one_size.then_some(info.subgroup_min_size),
        timestamps: features.contains(timestamp_features()),
        kernels: KernelChoices::default(),
    }
}

fn timestamp_features() -> wgpu::Features {
    wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES
}

fn summarise(
    info: wgpu::AdapterInfo,
    limits: &wgpu::Limits,
    features: wgpu::Features,
) -> AdapterSummary {
    let capabilities = capabilities_of(&info, limits, features);
    AdapterSummary {
        subgroup_sizes: capabilities
            .subgroups
            .then_some([info.subgroup_min_size, info.subgroup_max_size]),
        capabilities,
        backend: backend_name(info.backend),
        driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
        name: info.name,
    }
}

fn summarise_adapter(adapter: &wgpu::Adapter) -> AdapterSummary {
    let (limits, features) = (adapter.limits(), adapter.features());
    summarise(adapter.get_info(), &limits, features)
}

/// What is known of an open device.
pub(crate) fn summarise_device(device: &wgpu::Device) -> AdapterSummary {
    let summary = summarise(device.adapter_info(), &device.limits(), device.features());
    #[cfg(target_arch = "wasm32")]
    let summary = AdapterSummary {
        name: name_in_browser(device, summary.name),
        ..summary
    };
    summary
}

/// A browser seldom gives an adapter's name to a page, but says who made it.
#[cfg(target_arch = "wasm32")]
fn name_in_browser(device: &wgpu::Device, name: String) -> String {
    if !name.is_empty() {
        return name;
    }
    let words = match device
        .as_webgpu()
        .map(wgpu::webgpu::GpuDevice::adapter_info)
    {
        Some(info) if info.is_object() => [info.vendor(), info.architecture()].join(" "),
        _ => String::new(),
    };
    match words.trim() {
        "" => "the browser's GPU".to_owned(),
        words => words.to_owned(),
    }
}

fn instance(backends: wgpu::Backends) -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        flags: wgpu::InstanceFlags::empty().with_env(),
        backend_options: wgpu::BackendOptions::from_env_or_default(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

async fn enumerate(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let instance = instance(backends);
    // A browser hands out one adapter on request and lists none.
    if cfg!(target_arch = "wasm32") {
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..wgpu::RequestAdapterOptions::default()
        };
        return instance
            .request_adapter(&options)
            .await
            .into_iter()
            .collect();
    }
    let mut adapters = instance.enumerate_adapters(backends).await;
    adapters.retain(|adapter| {
        adapter
            .get_downlevel_capabilities()
            .flags
            .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
            && adapter.limits().max_storage_buffers_per_shader_stage >= 8
    });
    adapters.sort_by_key(|adapter| class_of(&adapter.get_info()));
    adapters
}

/// Every adapter on the machine that can run the kernels, the one that would be taken first.
pub(crate) async fn list() -> Vec<AdapterSummary> {
    let mut adapters = enumerate(wgpu::Backends::PRIMARY).await;
    adapters.extend(enumerate(wgpu::Backends::GL).await);
    adapters.iter().map(summarise_adapter).collect()
}

/// The adapter that a request means. `None`: the CPU executor.
pub(crate) async fn choose(request: &Request) -> Result<Option<wgpu::Adapter>> {
    match request {
        Request::Cpu => Ok(None),
        Request::Best => {
            if let Some(adapter) = enumerate(wgpu::Backends::PRIMARY).await.into_iter().next() {
                return Ok(Some(adapter));
            }
            // GL on a software rasteriser is slower than the CPU executor: it is taken only when asked for by name.
            let gl = enumerate(wgpu::Backends::GL).await;
            Ok(gl
                .into_iter()
                .find(|adapter| class_of(&adapter.get_info()) != AdapterClass::Software))
        }
        Request::Backend(name) => {
            let backends = BACKENDS
                .iter()
                .find(|(n, ..)| n == name)
                .map_or(wgpu::Backends::empty(), |(_, b, _)| *b);
            let adapter = enumerate(backends).await.into_iter().next();
            adapter.map(Some).ok_or_else(|| Error::NoAdapter {
                requested: (*name).to_owned(),
                reason: "no driver of that backend offers an adapter that can run compute shaders"
                    .to_owned(),
            })
        }
        Request::Named(text) => {
            let mut available = vec!["cpu".to_owned()];
            for backends in [wgpu::Backends::PRIMARY, wgpu::Backends::GL] {
                for adapter in enumerate(backends).await {
                    let summary = summarise_adapter(&adapter);
                    if summary.name.to_ascii_lowercase().contains(text) {
                        return Ok(Some(adapter));
                    }
                    if !available.iter().any(|known| known == summary.backend) {
                        available.push(summary.backend.to_owned());
                    }
                    available.push(format!("\"{}\"", summary.name));
                }
            }
            Err(Error::UnknownDevice {
                requested: text.clone(),
                available,
            })
        }
    }
}

/// An adapter, opened with all its limits and the features that kernels can use.
pub(crate) async fn open(
    adapter: &wgpu::Adapter,
) -> Result<(wgpu::Device, wgpu::Queue, AdapterSummary)> {
    let wanted = timestamp_features() | wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP;
    let opened = adapter
        .request_device(&wgpu::DeviceDescriptor {
            label: Some("rankmix"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..wgpu::DeviceDescriptor::default()
        })
        .await;
    let (device, queue) = opened.map_err(|error| Error::NoAdapter {
        requested: adapter.get_info().name,
        reason: error.to_string(),
    })?;
    let summary = summarise_device(&device);
    Ok((device, queue, summary))
}
