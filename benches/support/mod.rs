//! What the benches share: devices side by side, and sessions of a single operation.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId};
use rankmix::{DType, Device, Graph, ParameterStore, Result, Session, Tensor, TensorType, Value};

/// The GPU that `Device::open` would take, if there is one, and the CPU.
pub fn devices() -> Vec<(&'static str, Device)> {
    let opened = Device::open()
        .ok()
        .filter(|device| device.adapter().is_some());
    let mut devices: Vec<(&'static str, Device)> =
        opened.map(|device| ("gpu", device)).into_iter().collect();
    if let Some((_, gpu)) = devices.first() {
        eprintln!("gpu is {}", gpu.name());
    }
    devices.push(("cpu", Device::cpu()));
    devices
}

/// Floats that are all different; integers that go round and round below a limit.
pub fn ramp(ty: &TensorType, limit: usize) -> Tensor {
    let count = ty.elements();
    let made = match ty.dtype {
        DType::I32 => Tensor::i32(
            &ty.shape,
            (0..count).map(|i| (i * 7919 % limit) as i32).collect(),
        ),
        _ => Tensor::f32(
            &ty.shape,
            (0..count)
                .map(|i| (i as f32 * 0.618_034).fract() - 0.5)
                .collect(),
        ),
    };
    made.expect("as many elements as the shape says")
}

/// A session of a small graph. Integer inputs hold numbers below `limit`.
pub fn session(
    device: &Device,
    inputs: &[TensorType],
    limit: usize,
    build: impl Fn(&mut Graph, &[Value]) -> Result<Vec<Value>>,
) -> Result<Session> {
    let mut graph = Graph::new();
    let values = inputs
        .iter()
        .enumerate()
        .map(|(index, ty)| graph.input(&format!("input{index}"), ty.clone()))
        .collect::<Result<Vec<_>>>()?;
    for output in build(&mut graph, &values)? {
        graph.output(output)?;
    }
    let store = ParameterStore::new(device);
    store.initialize(&graph, 1)?;
    let mut session = graph.compile(&store)?;
    for (value, ty) in values.iter().zip(inputs) {
        session.write(*value, &ramp(ty, limit))?;
    }
    Ok(session)
}

/// Times synchronised runs.
pub fn time(
    group: &mut BenchmarkGroup<'_, WallTime>,
    device: &str,
    size: &str,
    mut session: Session,
) {
    group.bench_function(BenchmarkId::new(device, size), |bencher| {
        bencher.iter(|| {
            session.run().expect("a session that compiled runs");
            session.device().wait().expect("the device is there");
        });
    });
}
