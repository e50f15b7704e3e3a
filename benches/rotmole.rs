//! The RotMoLE layer, forward and forward plus backward, GPU against the CPU executor.

mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rankmix::TensorType;
use rankmix::layers::{AdapterOptions, GateInput, Linear, RotMole, Routing};
use rankmix::ops::Rotation;

const TOKENS: usize = 512;
const WIDTH: usize = 1024;
const RANK: usize = 16;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

fn run(criterion: &mut Criterion) {
    let devices = support::devices();
    let kinds = Rotation::ALL.map(|rotation| (rotation, GateInput::Input));
    let still = (Rotation::Planes, GateInput::Static);
    for (rotation, gate_input) in kinds.into_iter().chain([still]) {
        let layer = RotMole::with_rotation(
            Linear::new("layer", WIDTH, WIDTH),
            AdapterOptions::new(RANK, 32.0),
            Routing::new(EXPERTS, TOP_K),
            rotation,
            gate_input,
        )
        .expect("the sizes suit the layer");
        let name = match gate_input {
            GateInput::Static => format!("rotmole_{rotation}_static"),
            _ => format!("rotmole_{rotation}"),
        };
        let mut group = criterion.benchmark_group(name);
        // Multiply-adds of the base, twice: what everything else is measured against.
        group
            .throughput(Throughput::Elements((2 * TOKENS * WIDTH * WIDTH) as u64))
            .sample_size(20);
        let size = format!(
            "{TOKENS}tokens_{WIDTH}to{WIDTH}_rank{RANK}_{EXPERTS}experts_top{TOP_K}_base_flop"
        );
        let types = [
            TensorType::f32([TOKENS, WIDTH]),
            TensorType::f32([TOKENS, WIDTH]),
        ];
        for (label, device) in &devices {
            let forward = support::session(device, &types[..1], 1, |g, v| {
                Ok(vec![layer.forward(g, v[0])?.output])
            });
            support::time(
                &mut group,
                label,
                &format!("forward/{size}"),
                forward.expect("the layer compiles"),
            );
            let step = support::session(device, &types, 1, |g, v| {
                let output = layer.forward(g, v[0])?.output;
                let wanted: Vec<_> = [v[0]].into_iter().chain(g.trainable()).collect();
                let mut outputs = g.gradients_from(&[(output, v[1])], &wanted)?;
                outputs.push(output);
                Ok(outputs)
            });
            support::time(
                &mut group,
                label,
                &format!("forward_backward/{size}"),
                step.expect("the layer compiles"),
            );
        }
        group.finish();
    }
}

criterion_group!(rotmole, run);
criterion_main!(rotmole);
