//! A list of dispatches with everything resolved: pipelines, bind groups, offsets. Recording it into an encoder allocates nothing.

use std::sync::Arc;

use crate::device::counters::LiveCounters;
use crate::device::gpu::{BUFFER_ALIGNMENT, Buffer, Gpu};
use crate::device::launch::{Binding, Launch};
use crate::device::pipelines::{Pipeline, param_bytes};
use crate::error::{Error, Result};

/// A buffer as a kernel sees it: its first `bytes`.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    pub(crate) buffer: Buffer,
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Dispatch {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    bindings: Vec<Binding>,
    label: String,
    param_offset: u32,
    param_bytes: u64,
    workgroups: [u32; 3],
}

/// The dispatches of a session, ready to be encoded any number of times.
#[derive(Debug)]
pub(crate) struct Recording {
    dispatches: Vec<Dispatch>,
    params: Buffer,
}

impl Recording {
    /// Builds pipelines and bind groups for the launches. `bound` gives the buffers of one launch, in the order of its bindings.
    pub(crate) fn new(gpu: &Gpu, launches: &[(&Launch, Vec<Bound>)]) -> Result<Self> {
        let alignment = u64::from(gpu.summary.capabilities.uniform_alignment);
        let mut bytes: Vec<u8> = Vec::new();
        let mut offsets = Vec::with_capacity(launches.len());
        for (launch, _) in launches {
            bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
            offsets.push(bytes.len() as u32);
            bytes.extend(launch.params.iter().flat_map(|word| word.0.to_ne_bytes()));
        }
        // The last binding's padded size must fit too.
        bytes.resize(
            bytes.len().next_multiple_of(alignment.max(256) as usize) + 256,
            0,
        );
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let params = gpu.create(
            "uniform parameters",
            bytes.len() as u64,
            usage,
            gpu.summary.capabilities.max_buffer_bytes,
        )?;
        gpu.write(&params, &bytes);

        let mut recording = Self {
            dispatches: Vec::with_capacity(launches.len()),
            params,
        };
        let kernels: Vec<&Launch> = launches.iter().map(|(launch, _)| *launch).collect();
        let pipelines = gpu.pipelines(&kernels)?;
        for (((launch, bound), param_offset), pipeline) in
            launches.iter().zip(offsets).zip(pipelines)
        {
            let param_bytes = param_bytes(launch);
            let label = format!("{}::{}", launch.shader.name, launch.entry);
            let bind_group =
                recording.bind(gpu, &label, &pipeline, &launch.bindings, bound, param_bytes)?;
            recording.dispatches.push(Dispatch {
                pipeline,
                bind_group,
                bindings: launch.bindings.clone(),
                label,
                param_offset,
                param_bytes,
                workgroups: launch.workgroups,
            });
        }
        Ok(recording)
    }

    fn bind(
        &self,
        gpu: &Gpu,
        label: &str,
        pipeline: &Pipeline,
        bindings: &[Binding],
        bound: &[Bound],
        param_bytes: u64,
    ) -> Result<wgpu::BindGroup> {
        let uniform = wgpu::BufferBinding {
            buffer: self.params.raw(),
            offset: 0,
            size: wgpu::BufferSize::new(param_bytes),
        };
        let mut entries = vec![wgpu::BindGroupEntry {
            binding: 0,
            resource: wgpu::BindingResource::Buffer(uniform),
        }];
        let limit = gpu.summary.capabilities.max_binding_bytes;
        for (binding, Bound { buffer, bytes }) in bindings.iter().zip(bound) {
            let size = bytes
                .max(&1)
                .next_multiple_of(BUFFER_ALIGNMENT)
                .min(buffer.raw().size());
            if size > limit {
                return Err(Error::Limit {
                    thing: label.to_owned(),
                    needed: size,
                    limit,
                    unit: "bytes in one binding",
                });
            }
            let resource = wgpu::BufferBinding {
                buffer: buffer.raw(),
                offset: 0,
                size: wgpu::BufferSize::new(size),
            };
            entries.push(wgpu::BindGroupEntry {
                binding: binding.number,
                resource: wgpu::BindingResource::Buffer(resource),
            });
        }
        LiveCounters::count(&gpu.counters.bind_groups, 1);
        let descriptor = wgpu::BindGroupDescriptor {
            label: Some(label),
            layout: &pipeline.layout,
            entries: &entries,
        };
        gpu.scoped(label, 0, || gpu.device.create_bind_group(&descriptor))
    }

    /// Binds other buffers to one dispatch.
    pub(crate) fn rebind(&mut self, gpu: &Gpu, index: usize, bound: &[Bound]) -> Result<()> {
        let dispatch = &self.dispatches[index];
        let bind_group = self.bind(
            gpu,
            &dispatch.label,
            &dispatch.pipeline,
            &dispatch.bindings,
            bound,
            dispatch.param_bytes,
        )?;
        self.dispatches[index].bind_group = bind_group;
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.dispatches.len()
    }

    /// Records one compute pass with all dispatches. With `timestamps`, query `i` is written before dispatch `i`, and one more
    /// after the last.
    pub(crate) fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        timestamps: Option<&wgpu::QuerySet>,
    ) {
        LiveCounters::count(&gpu.counters.passes, 1);
        LiveCounters::count(&gpu.counters.launches, self.dispatches.len() as u64);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("rankmix"),
            timestamp_writes: None,
        });
        let mut last: Option<&Arc<Pipeline>> = None;
        for (index, dispatch) in self.dispatches.iter().enumerate() {
            if let Some(queries) = timestamps {
                pass.write_timestamp(queries, index as u32);
            }
            if !last.is_some_and(|pipeline| Arc::ptr_eq(pipeline, &dispatch.pipeline)) {
                pass.set_pipeline(&dispatch.pipeline.pipeline);
                last = Some(&dispatch.pipeline);
            }
            pass.set_bind_group(0, &dispatch.bind_group, &[dispatch.param_offset]);
            let [x, y, z] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, z);
        }
        if let Some(queries) = timestamps {
            pass.write_timestamp(queries, self.dispatches.len() as u32);
        }
    }

    pub(crate) fn label(&self, index: usize) -> &str {
        &self.dispatches[index].label
    }
}
