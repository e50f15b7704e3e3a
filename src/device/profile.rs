//! Timing single launches with timestamp queries, where the adapter can.

use crate::device::gpu::Gpu;
use crate::device::recording::Recording;
use crate::error::{Error, Result};

/// How long one launch took on the device.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchTiming {
    /// `shader::entry`.
    pub kernel: String,
    /// Seconds on the device.
    pub seconds: f64,
}

/// wgpu's limit on a query set; a longer recording cannot be timed in one pass.
const MAX_QUERIES: usize = 4096;

impl Recording {
    /// Runs the recording once and times every launch.
    pub(crate) async fn profile(&self, gpu: &Gpu, poll: bool) -> Result<Vec<LaunchTiming>> {
        if !gpu.summary.capabilities.timestamps {
            return Err(Error::Gpu {
                thing: "timing launches".to_owned(),
                reason: format!(
                    "the adapter `{}` has no timestamps inside passes",
                    gpu.summary.name
                ),
            });
        }
        let count = self.len() + 1;
        if count > MAX_QUERIES {
            return Err(Error::Limit {
                thing: "timing launches".to_owned(),
                needed: count as u64,
                limit: MAX_QUERIES as u64,
                unit: "timestamps",
            });
        }
        let bytes = count as u64 * 8;
        let queries = gpu.scoped("a query set", bytes, || {
            gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("rankmix timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: count as u32,
            })
        })?;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.create("timestamps", bytes, usage, u64::MAX)?;
        let staging = gpu.staging(bytes)?;
        let mut encoder = gpu
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.encode(gpu, &mut encoder, Some(&queries));
        encoder.resolve_query_set(&queries, 0..count as u32, resolved.raw(), 0);
        encoder.copy_buffer_to_buffer(resolved.raw(), 0, staging.raw(), 0, Some(bytes));
        gpu.submit("timing launches", encoder)?;
        let mapping = gpu.map(&staging, bytes)?;
        let raw = gpu.contents(vec![mapping], poll).await?.remove(0);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&raw);
        let seconds_per_tick = f64::from(gpu.queue.get_timestamp_period()) * 1e-9;
        Ok(ticks
            .windows(2)
            .enumerate()
            .map(|(index, pair)| LaunchTiming {
                kernel: self.label(index).to_owned(),
                seconds: pair[1].saturating_sub(pair[0]) as f64 * seconds_per_tick,
            })
            .collect())
    }
}
