//! Every operation, GPU against the CPU executor. `cargo bench --bench ops -- matmul` runs a part.

mod operations;
mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use rankmix::{Error, Tensor};

use crate::operations::benches;

fn run(criterion: &mut Criterion) {
    let devices = support::devices();
    for bench in benches() {
        let mut group = criterion.benchmark_group(bench.op);
        group.throughput(bench.work.clone()).sample_size(20);
        for (label, device) in &devices {
            let mut session = support::session(device, &bench.inputs, bench.limit, &bench.build)
                .expect("the bench's graph compiles");
            // What an optimiser reads, where there is one: the rate and the corrections.
            let schedule = Tensor::f32([3], vec![1e-3, 1.0, 1.0]).expect("three numbers");
            match session.set("adamw.schedule", &schedule) {
                Ok(()) | Err(Error::UnknownName { .. }) => {}
                Err(error) => panic!("the schedule: {error}"),
            }
            support::time(&mut group, label, bench.size, session);
        }
        group.finish();
    }
}

criterion_group!(ops, run);
criterion_main!(ops);
