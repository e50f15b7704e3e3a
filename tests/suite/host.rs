//! A host application with a wgpu device of its own: its limits, its encoder, its buffers, and what happens when it loses the device.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use libtest_mimic::{Failed, Trial};
use rankmix::graph::SessionOptions;
use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
use rankmix::train::{AdamW, GradientAccumulation};
use rankmix::{
    Device, Error, Graph, ParameterStore, Precision, Result, Session, Tensor, TensorType, Value,
    wgpu,
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

/// An encoded run has the noise that was set, or that of a host's own seed and step.
fn noise_in_an_encoder(backend: &str) -> Result<(), Failed> {
    let (raw, queue) = host_device(backend).ok_or("the adapter is gone")?;
    let device = Device::from_wgpu(&raw, &queue, false)?;
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([64]))?;
    let y = graph.dropout(x, 0.5)?;
    let random = graph.named("rankmix.random")?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(&device))?;
    session.write(x, &Tensor::f32([64], vec![1.0; 64])?)?;
    session.set_random(4, 9)?;
    let want = session.run_reading(&[y])?;
    let first = session.run_reading(&[y])?;
    if want == first {
        return Err("two steps have one mask".into());
    }
    let encoded = |session: &mut Session| -> Result<Vec<Tensor>> {
        let mut encoder = raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        session.encode(&mut encoder)?;
        queue.submit([encoder.finish()]);
        Ok(vec![session.read(y)?])
    };
    if encoded(&mut session)? != first {
        return Err("without a new step, the encoded run has not the noise of the last one".into());
    }
    session.set_random(4, 9)?;
    if encoded(&mut session)? != want {
        return Err("the encoded run has not the noise that was set".into());
    }
    session.set_random(5, 0)?;
    let words = buffer(
        &raw,
        2,
        wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
    );
    queue.write_buffer(&words, 0, &[4, 0, 0, 0, 9, 0, 0, 0]);
    session.bind(random, &words)?;
    for _ in 0..2 {
        if session.run_reading(&[y])? != want {
            return Err("a run has not the noise of the host's buffer".into());
        }
    }
    Ok(())
}

/// Runs a future to its end, as an application does that polls its device between frames.
fn polled<T>(raw: &wgpu::Device, future: impl Future<Output = Result<T>>) -> Result<T> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(outcome) = future.as_mut().poll(&mut context) {
            return outcome;
        }
        // What is lost shows in the future.
        let _ = raw.poll(wgpu::PollType::Poll);
    }
}

/// Calls that are awaited give what those that block give.
fn awaiting_is_the_same(backend: &str) -> Result<(), Failed> {
    let (raw, queue) = host_device(backend).ok_or("the adapter is gone")?;
    let device = Device::from_wgpu(&raw, &queue, true)?;
    let mut losses = Vec::new();
    for awaits in [false, true] {
        let mut graph = Graph::new();
        graph.set_precision(Precision::F16);
        let x = graph.input("x", TensorType::f32([4, 3]))?;
        let labels = graph.input("labels", TensorType::i32([4]))?;
        let logits = Linear::new("layer", 3, 2)
            .trained()
            .forward(&mut graph, x)?;
        let loss = graph.cross_entropy(logits, labels)?;
        graph.output(loss)?;
        let gradients = graph.backward(loss)?;
        let accumulated = GradientAccumulation::new(2)?.add_to(&mut graph, &gradients)?;
        let store = ParameterStore::new(&device);
        let adamw = AdamW::default();
        let (mut session, mut update) = if awaits {
            polled(&raw, store.initialize_async(&graph, 5))?;
            polled(&raw, store.convert_async(&graph))?;
            let session = graph.compile_async(&store, SessionOptions::default());
            let update = accumulated.compile_async(&adamw, &store);
            (polled(&raw, session)?, polled(&raw, update)?)
        } else {
            store.initialize(&graph, 5)?;
            store.convert(&graph)?;
            (graph.compile(&store)?, accumulated.compile(&adamw, &store)?)
        };
        session.write(x, &floats(&[4, 3], 410))?;
        session.write(labels, &Tensor::i32([4], vec![0, 1, 0, 1])?)?;
        let mut seen = Vec::new();
        for _ in 0..6 {
            // A value asked for twice is given twice.
            let read = [loss, loss];
            if awaits {
                seen.extend(polled(&raw, session.run_reading_async(&read))?);
                polled(&raw, update.micro_batch_done_async(0.1))?;
            } else {
                seen.extend(session.run_reading(&read)?);
                update.micro_batch_done(0.1)?;
            }
        }
        seen.push(if awaits {
            polled(&raw, session.run_async())?;
            polled(&raw, device.wait_async())?;
            polled(&raw, session.read_async(loss))?
        } else {
            session.run()?;
            device.wait()?;
            session.read(loss)?
        });
        seen.push(if awaits {
            polled(&raw, store.read_async("layer.weight"))?
        } else {
            store.read("layer.weight")?
        });
        losses.push(seen);
    }
    if losses[0] != losses[1] {
        return Err("awaiting gives other numbers than blocking".into());
    }
    if losses[0][0] == losses[0][12] || losses[0][0] != losses[0][1] {
        return Err("the steps were not what they should be".into());
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
    trials.extend(devices::backend_trials(
        "host::awaiting_is_the_same",
        awaiting_is_the_same,
    ));
    trials.extend(devices::backend_trials(
        "host::noise_in_an_encoder",
        noise_in_an_encoder,
    ));
    trials
}
