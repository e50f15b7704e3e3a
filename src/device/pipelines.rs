//! Compute pipelines, built once for each (shader, entry point, constants, bindings) and shared by all sessions of a device.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(not(target_arch = "wasm32"))]
use crate::device::PIPELINE_CACHE_VARIABLE;
use crate::device::counters::LiveCounters;
use crate::device::gpu::Gpu;
use crate::device::launch::{Access, Launch, Shader};
#[cfg(not(target_arch = "wasm32"))]
use crate::device::pipeline_file::PipelineFile;
use crate::error::{Error, Result};

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    shader: Shader,
    entry: &'static str,
    /// Constants by their bits: f64 has no equality that a map could use.
    constants: Vec<(&'static str, u64)>,
    bindings: Vec<(u32, Access)>,
    param_bytes: u64,
}

/// Things that are built once each, different ones at the same time on different threads. Whoever wants one that is being built waits
/// for it, and builds it if that failed.
#[derive(Debug)]
struct BuiltOnce<K, V>(Mutex<HashMap<K, Arc<Mutex<Option<V>>>>>);

impl<K, V> Default for BuiltOnce<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> BuiltOnce<K, V> {
    /// `build` must not wait for other threads of a pool: one of them may wait here.
    fn get_or_build(&self, key: K, build: impl FnOnce() -> Result<V>) -> Result<V> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(key).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(built) = &*slot {
            return Ok(built.clone());
        }
        let built = build()?;
        *slot = Some(built.clone());
        Ok(built)
    }

    fn clear(&self) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.clear();
    }
}

#[derive(Debug, Default)]
pub(crate) struct PipelineCache {
    modules: BuiltOnce<Shader, wgpu::ShaderModule>,
    pipelines: BuiltOnce<Key, Arc<Pipeline>>,
    /// What earlier processes compiled, where the user wants it kept.
    #[cfg(not(target_arch = "wasm32"))]
    file: Option<PipelineFile>,
}

impl PipelineCache {
    /// What the driver may know of pipelines from earlier processes.
    fn compiled_before(&self) -> Option<&wgpu::PipelineCache> {
        #[cfg(not(target_arch = "wasm32"))]
        return self.file.as_ref().map(PipelineFile::cache);
        #[cfg(target_arch = "wasm32")]
        None
    }
}

impl Key {
    fn of(launch: &Launch) -> Self {
        Self {
            shader: launch.shader,
            entry: launch.entry,
            constants: launch
                .constants
                .iter()
                .map(|&(name, value)| (name, value.to_bits()))
                .collect(),
            bindings: launch
                .bindings
                .iter()
                .map(|binding| (binding.number, binding.access))
                .collect(),
            param_bytes: param_bytes(launch),
        }
    }
}

/// The size of a launch's uniform parameters, padded as WGSL pads a struct in uniform memory.
pub(crate) fn param_bytes(launch: &Launch) -> u64 {
    (launch.params.len().max(1) as u64 * 4).next_multiple_of(16)
}

#[cfg(not(target_arch = "wasm32"))]
impl Gpu {
    /// Keeps compiled pipelines in a folder, or else in the one that the environment names, if it does.
    pub(crate) fn keep_pipelines(&mut self, folder: Option<PathBuf>) -> Result<()> {
        let named = || std::env::var_os(PIPELINE_CACHE_VARIABLE).map(PathBuf::from);
        let folder = folder.or_else(named);
        if let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty()) {
            self.pipelines.file = PipelineFile::open(self, &folder)?;
        }
        Ok(())
    }

    pub(crate) fn save_pipelines(&self) -> Result<bool> {
        self.pipelines
            .file
            .as_ref()
            .map_or(Ok(false), PipelineFile::save)
    }
}

/// A browser keeps what it compiles by itself, and gives none of it out.
#[cfg(target_arch = "wasm32")]
impl Gpu {
    pub(crate) fn keep_pipelines(&mut self, _folder: Option<PathBuf>) -> Result<()> {
        Ok(())
    }

    pub(crate) fn save_pipelines(&self) -> Result<bool> {
        Ok(false)
    }
}

impl Gpu {
    /// The pipeline of each launch. Natively those that are missing are built in parallel; if several cannot be, the error is that of
    /// the first launch among them.
    ///
    /// wgpu's error scopes are a thread's own, so each build hears of its own errors alone, on a host application's device too.
    pub(crate) fn pipelines(&self, launches: &[&Launch]) -> Result<Vec<Arc<Pipeline>>> {
        if self.reports.failed_late() {
            // One of them may be what failed; sessions keep theirs.
            self.pipelines.pipelines.clear();
            self.pipelines.modules.clear();
        }
        // A browser compiles beside us.
        #[cfg(not(target_arch = "wasm32"))]
        self.build_in_parallel(launches)?;
        launches
            .iter()
            .map(|launch| self.pipeline(launch))
            .collect()
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn build_in_parallel(&self, launches: &[&Launch]) -> Result<()> {
        use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

        // On GL all calls wait for each other anyway.
        if self.is_gl() {
            return Ok(());
        }
        let mut seen = std::collections::HashSet::new();
        let distinct: Vec<&Launch> = launches
            .iter()
            .copied()
            .filter(|launch| seen.insert(Key::of(launch)))
            .collect();
        let built: Vec<Result<Arc<Pipeline>>> = distinct
            .into_par_iter()
            .with_max_len(1)
            .map(|launch| self.pipeline(launch))
            .collect();
        // The error of the first launch in order, whichever came first in time.
        built.into_iter().try_for_each(|built| built.map(drop))
    }

    fn pipeline(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        let cache = &self.pipelines.pipelines;
        cache.get_or_build(Key::of(launch), || {
            let pipeline = Arc::new(self.build_pipeline(launch)?);
            LiveCounters::count(&self.counters.pipelines, 1);
            Ok(pipeline)
        })
    }

    fn build_pipeline(&self, launch: &Launch) -> Result<Pipeline> {
        let label = format!("{}::{}", launch.shader.name, launch.entry);
        let most = self.summary.capabilities.max_storage_buffers;
        if launch.bindings.len() > most as usize {
            return Err(Error::Limit {
                thing: format!("the kernel `{label}`"),
                needed: launch.bindings.len() as u64,
                limit: u64::from(most),
                unit: "storage buffers",
            });
        }
        let module = self.module(launch.shader)?;
        let entry = |binding: u32, ty: wgpu::BufferBindingType, dynamic: bool, size: u64| {
            wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty,
                    has_dynamic_offset: dynamic,
                    min_binding_size: wgpu::BufferSize::new(size),
                },
                count: None,
            }
        };
        let mut entries = vec![entry(
            0,
            wgpu::BufferBindingType::Uniform,
            true,
            param_bytes(launch),
        )];
        for binding in &launch.bindings {
            let read_only = binding.access == Access::Read;
            entries.push(entry(
                binding.number,
                wgpu::BufferBindingType::Storage { read_only },
                false,
                0,
            ));
        }
        self.scoped(&label, 0, || {
            let layout = self
                .device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                    label: Some(&label),
                    entries: &entries,
                });
            let pipeline_layout =
                self.device
                    .create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                        label: Some(&label),
                        bind_group_layouts: &[Some(&layout)],
                        immediate_size: 0,
                    });
            let pipeline = self
                .device
                .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(&label),
                    layout: Some(&pipeline_layout),
                    module: &module,
                    entry_point: Some(launch.entry),
                    compilation_options: wgpu::PipelineCompilationOptions {
                        constants: &launch.constants,
                        // In GLSL and HLSL the zeros are written out one by one: a few thousand take Mesa's compiler and Microsoft's
                        // FXC minutes.
                        zero_initialize_workgroup_memory: self.checked
                            && !matches!(self.summary.backend, "gl" | "dx12"),
                    },
                    cache: self.pipelines.compiled_before(),
                });
            Pipeline { pipeline, layout }
        })
    }

    fn module(&self, shader: Shader) -> Result<wgpu::ShaderModule> {
        let modules = &self.pipelines.modules;
        modules.get_or_build(shader, || self.build_module(shader))
    }

    fn build_module(&self, shader: Shader) -> Result<wgpu::ShaderModule> {
        // The standard insists on the line, and so do browsers; naga knows the built-ins and not the line.
        let source = if cfg!(target_arch = "wasm32") {
            shader.source.into()
        } else {
            shader.source.replace("enable subgroups;", "").into()
        };
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(shader.name),
            source: wgpu::ShaderSource::Wgsl(source),
        };
        self.scoped(shader.name, 0, || {
            if self.checked {
                self.device.create_shader_module(descriptor)
            } else {
                self.trusted_module(descriptor)
            }
        })
    }

    /// A module without runtime checks: bounds checks cost up to 5 times the cycles of a tiled matmul.
    #[expect(
        unsafe_code,
        reason = "wgpu marks the absence of bounds checks as unsafe"
    )]
    fn trusted_module(&self, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
        // SAFETY: without checks a kernel must stay inside its buffers by itself. Ours do by construction: every index is
        // guarded against the sizes in the uniform parameters, which come from the shapes that the buffers were sized
        // by; indices that come from data (labels, token ids, experts) are clamped, or made by our own sort, whose
        // results only our own types carry; every
        // loop ends after a count known from the parameters. The test suite runs every kernel with and without the
        // checks, on buffers poisoned with NaN. Ops that an application adds make the same promise (see `Op`).
        unsafe {
            self.device
                .create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        }
    }
}
