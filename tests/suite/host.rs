//! A host application with a wgpu device of its own: its limits, its encoder, its buffers, and what happens when it loses the device.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
use rankmix::{
    Device, Error, Graph, ParameterStore, Result, Session, Tensor, TensorType, Value, wgpu,
};

use crate::case::floats;
use crate::devices;

const TOKENS: usize = 7;
const D_IN: usize = 12;
const D_OUT: usize = 9;

/// A device with WebGPU's default limits, as an application would open it, on the backend of a test.
pub fn host_device(backend: &str) -> Option<(wgpu::Device, wgpu::Queue)> {
    let backends = match backend {
        "gl" => wgpu::Backends::GL,
        _ => wgpu::Backends::PRIMARY,
    };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapter =
        pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
            .ok()?;
    let limits = wgpu::Limits::downlevel_defaults();
    let limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 8,
        ..limits
    };
    let descriptor = wgpu::DeviceDescriptor {
        required_limits: limits,
        ..wgpu::DeviceDescriptor::default()
    };
    pollster::block_on(adapter.request_device(&descriptor)).ok()
}

fn layer_on(device: &Device) -> Result<(Session, Value, Value)> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, D_IN]))?;
    let layer = RotMole::new(
        Linear::new("layer", D_IN, D_OUT),
        AdapterOptions::new(4, 8.0),
        Routing::new(3, 2),
    )?;
    let y = layer.forward(&mut graph, x)?.output;
    graph.output(y)?;
    let store = ParameterStore::new(device);
    store.initialize(&graph, 9)?;
    store.insert("layer.lora_b", &floats(&[3, D_OUT, 4], 400))?;
    Ok((graph.compile(&store)?, x, y))
}

fn buffer(device: &wgpu::Device, floats: usize, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let size = (floats as u64 * 4).next_multiple_of(16);
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    })
}

/// The host's buffers in, the host's buffers out, in the host's encoder: equal to a run with the session's own memory.
fn hosts_buffers_and_encoder(backend: &str) -> Result<(), Failed> {
    let (raw, queue) = host_device(backend).ok_or("the adapter is gone")?;
    let device = Device::from_wgpu(&raw, &queue, false)?;
    let x_data = Tensor::f32([TOKENS, D_IN], floats(&[TOKENS, D_IN], 401).to_f32())?;
    let (mut own, x, y) = layer_on(&device)?;
    own.write(x, &x_data)?;
    let want = own.run_reading(&[y])?.remove(0);

    let storage =
        wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let (input, output) = (
        buffer(&raw, TOKENS * D_IN, storage),
        buffer(&raw, TOKENS * D_OUT, storage),
    );
    let look = buffer(
        &raw,
        TOKENS * D_OUT,
        wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
    );
    queue.write_buffer(
        &input,
        0,
        bytemuck::cast_slice(x_data.as_f32().unwrap_or_default()),
    );
    let (mut session, x, y) = layer_on(&device)?;
    let small = buffer(&raw, 4, storage);
    let refused = session.bind(x, &small);
    if !matches!(refused, Err(Error::Limit { .. })) {
        return Err(format!("a buffer of 16 bytes was taken: {refused:?}").into());
    }
    session.bind(x, &input)?;
    session.bind(y, &output)?;
    let mut encoder = raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    session.encode(&mut encoder)?;
    encoder.copy_buffer_to_buffer(&output, 0, &look, 0, None);
    queue.submit([encoder.finish()]);
    look.slice(..).map_async(wgpu::MapMode::Read, |mapped| {
        mapped.expect("a buffer made for mapping can be mapped");
    });
    raw.poll(wgpu::PollType::wait_indefinitely())?;
    let seen: Vec<f32> = bytemuck::pod_collect_to_vec(&look.slice(..).get_mapped_range()?);
    if &seen[..TOKENS * D_OUT] == want.as_f32().unwrap_or_default() {
        Ok(())
    } else {
        Err("the host's buffer holds something else than the session's own".into())
    }
}

/// A device that is lost gives errors, not panics, from every call.
fn a_lost_device_is_an_error(backend: &str) -> Result<(), Failed> {
    let (raw, queue) = host_device(backend).ok_or("the adapter is gone")?;
    let device = Device::from_wgpu(&raw, &queue, false)?;
    let (mut session, x, y) = layer_on(&device)?;
    let x_data = floats(&[TOKENS, D_IN], 402);
    session.write(x, &x_data)?;
    session.run()?;
    raw.destroy();
    let outcomes = [
        ("write", session.write(x, &x_data).err()),
        ("run", session.run_reading(&[y]).err()),
        ("read", session.read(y).err()),
        ("compile", layer_on(&device).err()),
    ];
    for (call, outcome) in &outcomes[1..] {
        println!("{call}: {outcome:?}");
        if !matches!(
            outcome,
            Some(Error::DeviceLost { .. } | Error::Gpu { .. } | Error::OutOfMemory { .. })
        ) {
            return Err(format!("`{call}` on a lost device: {outcome:?}").into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials =
        devices::backend_trials("host::buffers_and_encoder", hosts_buffers_and_encoder);
    trials.extend(devices::backend_trials(
        "host::a_lost_device_is_an_error",
        a_lost_device_is_an_error,
    ));
    trials
}
