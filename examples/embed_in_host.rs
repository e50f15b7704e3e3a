//! An application that has a wgpu device and buffers of its own: a session records into the application's encoder, reads one of
//! its buffers and writes another. Nothing passes through the CPU in between.
//!
//!     cargo run --release --example embed_in_host

use std::error::Error;

use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
use rankmix::{Device, Graph, ParameterStore, TensorType, wgpu};

const TOKENS: usize = 32;
const D_IN: usize = 64;
const D_OUT: usize = 48;

fn buffer(
    device: &wgpu::Device,
    label: &str,
    floats: usize,
    usage: wgpu::BufferUsages,
) -> wgpu::Buffer {
    let size = floats as u64 * 4;
    device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage,
        mapped_at_creation: false,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    // The host's own device, with WebGPU's default limits: the library keeps inside them.
    let instance =
        wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter =
        pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
            .map_err(|error| {
                format!("this example needs a GPU adapter, a software one will do: {error}")
            })?;
    let (host_device, host_queue) =
        pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    println!("host device: {}", adapter.get_info().name);

    // The host's buffers: activations in, activations out, and one to look at the result.
    let storage =
        wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let activations = buffer(&host_device, "activations", TOKENS * D_IN, storage);
    let adapted = buffer(&host_device, "adapted", TOKENS * D_OUT, storage);
    let visible = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let look = buffer(&host_device, "look", TOKENS * D_OUT, visible);
    let x: Vec<f32> = (0..TOKENS * D_IN)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    host_queue.write_buffer(&activations, 0, bytemuck::cast_slice(&x));

    // The library on that device, and a layer whose input and output are the host's buffers.
    let device = Device::from_wgpu(&host_device, &host_queue, false)?;
    let mut graph = Graph::new();
    let input = graph.input("x", TensorType::f32([TOKENS, D_IN]))?;
    let layer = RotMole::new(
        Linear::new("proj", D_IN, D_OUT),
        AdapterOptions::new(8, 16.0),
        Routing::new(4, 2),
    )?;
    let output = layer.forward(&mut graph, input)?.output;
    graph.output(output)?;
    let store = ParameterStore::new(&device);
    store.initialize(&graph, 42)?;
    let mut session = graph.compile(&store)?;
    session.bind(input, &activations)?;
    session.bind(output, &adapted)?;

    // The host's frame: whatever it records itself, the layer in between, one submission for all of it.
    let mut encoder =
        host_device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    session.encode(&mut encoder)?;
    encoder.copy_buffer_to_buffer(&adapted, 0, &look, 0, None);
    host_queue.submit([encoder.finish()]);

    look.slice(..).map_async(wgpu::MapMode::Read, |mapped| {
        mapped.expect("a buffer made for mapping can be mapped");
    });
    host_device.poll(wgpu::PollType::wait_indefinitely())?;
    let seen: Vec<f32> = bytemuck::pod_collect_to_vec(&look.slice(..).get_mapped_range()?);
    println!(
        "recorded {} kernels into the host's encoder; first outputs {:?}",
        session.launches().len(),
        &seen[..4]
    );
    let norm = seen.iter().map(|y| y * y).sum::<f32>().sqrt();
    if !norm.is_finite() || norm == 0.0 {
        return Err("the host's buffer was not written".into());
    }
    Ok(())
}
