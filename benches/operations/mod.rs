//! The operations that `ops.rs` times, and at what sizes.

mod training;

use criterion::Throughput;
use rankmix::ops::{
    Activation, CoreMix, DropPolicy, Layout, Product, Projection, Rotation, Routed,
};
use rankmix::{Graph, Result, TensorType, Value};

pub type Build = Box<dyn Fn(&mut Graph, &[Value]) -> Result<Vec<Value>>>;

/// An operation to time: what it is called, its size in words, its inputs, and how much it does.
pub struct Bench {
    pub op: &'static str,
    pub size: &'static str,
    pub inputs: Vec<TensorType>,
    /// Integer inputs lie below this.
    pub limit: usize,
    pub work: Throughput,
    pub build: Build,
}

fn f(dims: &[usize]) -> TensorType {
    TensorType::f32(dims)
}

fn elements(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

fn i(dims: &[usize]) -> TensorType {
    TensorType::i32(dims)
}

/// Adds the gradients with respect to the first inputs, so that the backward kernels are timed too; the last is the upstream gradient.
fn with_gradients(
    count: usize,
    build: impl Fn(&mut Graph, &[Value]) -> Result<Value> + 'static,
) -> Build {
    Box::new(move |graph, inputs| {
        let output = build(graph, inputs)?;
        let upstream = *inputs.last().unwrap_or(&output);
        let mut outputs = graph.gradients_from(&[(output, upstream)], &inputs[..count])?;
        outputs.push(output);
        Ok(outputs)
    })
}

/// The same for the first input alone.
fn with_gradient(build: impl Fn(&mut Graph, &[Value]) -> Result<Value> + 'static) -> Build {
    with_gradients(1, build)
}

fn forward(build: impl Fn(&mut Graph, &[Value]) -> Result<Value> + 'static) -> Build {
    Box::new(move |graph, inputs| Ok(vec![build(graph, inputs)?]))
}

pub fn benches() -> Vec<Bench> {
    const T: usize = 512;
    const D: usize = 1024;
    let flop = |count: usize| Throughput::Elements(count as u64);
    let rotate = |op: &'static str, rotation: Rotation| Bench {
        op,
        size: "1024x16_forward_backward",
        inputs: vec![
            f(&[1024, 16]),
            f(&[1024, rotation.numbers(16).expect("every kind has rank 16")]),
            f(&[1024, 16]),
        ],
        limit: 1,
        work: elements(1024 * 16),
        build: with_gradient(move |g, v| g.rotate(rotation, v[0], v[1])),
    };
    let mix_cores = |size, mix: CoreMix, [experts, rank]: [usize; 2]| Bench {
        op: "mix_cores",
        size,
        inputs: vec![
            f(&[4096, rank]),
            f(&[experts, rank, rank]),
            f(&[4096, experts]),
        ],
        limit: 1,
        work: flop(2 * 4096 * experts * rank * rank),
        build: forward(move |g, v| g.mix_cores(v[0], v[1], v[2], mix)),
    };
    let mut benches = vec![
        mix_cores("4096x16_8experts_merge_flop", CoreMix::Merge, [8, 16]),
        mix_cores("4096x16_8experts_apply_flop", CoreMix::Apply, [8, 16]),
        mix_cores("4096x16_64experts_merge_flop", CoreMix::Merge, [64, 16]),
        mix_cores("4096x16_64experts_apply_flop", CoreMix::Apply, [64, 16]),
        mix_cores("4096x4_32experts_merge_flop", CoreMix::Merge, [32, 4]),
        mix_cores("4096x4_32experts_apply_flop", CoreMix::Apply, [32, 4]),
        Bench {
            op: "mix_cores",
            size: "4096x16_8experts_forward_backward_flop",
            inputs: vec![
                f(&[4096, 16]),
                f(&[8, 16, 16]),
                f(&[4096, 8]),
                f(&[4096, 16]),
            ],
            limit: 1,
            work: flop(6 * 4096 * 8 * 16 * 16),
            build: Box::new(|g, v| {
                let u = g.mix_cores(v[0], v[1], v[2], CoreMix::Auto)?;
                let mut outputs = g.gradients_from(&[(u, v[3])], &v[..3])?;
                outputs.push(u);
                Ok(outputs)
            }),
        },
        Bench {
            op: "mix_cores",
            size: "4096x16_top2_of_8experts_forward_backward_flop",
            inputs: vec![
                f(&[4096, 16]),
                f(&[8, 16, 16]),
                f(&[4096, 2]),
                i(&[4096, 2]),
                f(&[4096, 16]),
            ],
            limit: 8,
            work: flop(6 * 4096 * 2 * 16 * 16),
            build: Box::new(|g, v| {
                let routed = Routed {
                    gates: v[2],
                    segments: g.segments(v[3], 8)?,
                };
                let u = g.mix_routed_cores(v[0], v[1], routed, CoreMix::Auto)?;
                let mut outputs = g.gradients_from(&[(u, v[4])], &v[..3])?;
                outputs.push(u);
                Ok(outputs)
            }),
        },
        Bench {
            op: "softmax",
            size: "4096x64_forward_backward",
            inputs: vec![f(&[4096, 64]), f(&[4096, 64])],
            limit: 1,
            work: elements(4096 * 64),
            build: with_gradient(|g, v| g.softmax(v[0])),
        },
        Bench {
            op: "dropout",
            size: "1048576_forward_backward",
            inputs: vec![f(&[1 << 20]), f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: with_gradient(|g, v| g.dropout(v[0], 0.1)),
        },
        Bench {
            op: "jitter",
            size: "1048576",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.jitter(v[0], 0.1)),
        },
        Bench {
            op: "matmul_nt",
            size: "512x1024x1024_flop",
            inputs: vec![f(&[T, D]), f(&[D, D])],
            limit: 1,
            work: flop(2 * T * D * D),
            build: forward(|g, v| g.matmul_nt(v[0], v[1])),
        },
        Bench {
            op: "matmul_nn",
            size: "512x1024x1024_flop",
            inputs: vec![f(&[T, D]), f(&[D, D])],
            limit: 1,
            work: flop(2 * T * D * D),
            build: forward(|g, v| g.matmul(v[0], v[1])),
        },
        Bench {
            op: "matmul_bias",
            size: "512x1024x1024_flop",
            inputs: vec![f(&[T, D]), f(&[D, D]), f(&[D])],
            limit: 1,
            work: flop(2 * T * D * D),
            build: forward(|g, v| g.matmul_bias(Product::nt(v[0], v[1]), v[2])),
        },
        Bench {
            op: "matmul_sum",
            size: "512x1024x1024_and_16_flop",
            inputs: vec![f(&[T, D]), f(&[D, D]), f(&[T, 16]), f(&[D, 16])],
            limit: 1,
            work: flop(2 * T * D * (D + 16)),
            build: forward(|g, v| g.matmul_sum(Product::nt(v[0], v[1]), Product::nt(v[2], v[3]))),
        },
        Bench {
            op: "add",
            size: "1048576",
            inputs: vec![f(&[1 << 20]), f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.add(v[0], v[1])),
        },
        Bench {
            op: "sum",
            size: "1024x1024_rows",
            inputs: vec![f(&[D, D])],
            limit: 1,
            work: elements(D * D),
            build: forward(|g, v| g.sum(v[0], &[1])),
        },
        Bench {
            op: "silu",
            size: "1048576_forward_backward",
            inputs: vec![f(&[1 << 20]), f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: with_gradient(|g, v| g.silu(v[0])),
        },
        Bench {
            op: "rms_norm",
            size: "512x1024_forward_backward_of_both",
            inputs: vec![f(&[T, D]), f(&[D]), f(&[T, D])],
            limit: 1,
            work: elements(T * D),
            build: with_gradients(2, |g, v| g.rms_norm(v[0], v[1], 1e-5)),
        },
        Bench {
            op: "route_and_sort",
            size: "4096x64_top8",
            inputs: vec![f(&[4096, 64])],
            limit: 1,
            work: elements(4096 * 8),
            build: Box::new(|g, v| {
                let routed = g.route(v[0], 8, true)?;
                Ok(vec![routed.gates, routed.segments.order()])
            }),
        },
        // More tokens than one kernel routes and sorts.
        Bench {
            op: "route",
            size: "8192x64_top8_forward_backward",
            inputs: vec![f(&[8192, 64]), f(&[8192, 8])],
            limit: 1,
            work: elements(8192 * 8),
            build: with_gradient(|g, v| Ok(g.route(v[0], 8, true)?.gates)),
        },
        Bench {
            op: "shrink",
            size: "1024pairs_8experts_1024to16_flop",
            inputs: vec![f(&[T, D]), f(&[8, 16, D]), i(&[T, 2])],
            limit: 8,
            work: flop(2 * 2 * T * D * 16),
            build: forward(|g, v| {
                let segments = g.segments(v[2], 8)?;
                g.shrink(v[0], v[1], Layout::OutIn, segments)
            }),
        },
        Bench {
            op: "expand",
            size: "1024pairs_8experts_16to1024_forward_backward_flop",
            inputs: vec![
                f(&[2 * T, 16]),
                f(&[8, D, 16]),
                f(&[T, 2]),
                i(&[T, 2]),
                f(&[T, D]),
            ],
            limit: 8,
            work: flop(3 * 2 * 2 * T * D * 16),
            build: Box::new(|g, v| {
                let routed = Routed {
                    gates: v[2],
                    segments: g.segments(v[3], 8)?,
                };
                let y = g.expand(v[0], v[1], Layout::OutIn, routed, 2.0, None)?;
                let mut outputs = g.gradients_from(&[(y, v[4])], &v[..3])?;
                outputs.push(y);
                Ok(outputs)
            }),
        },
        Bench {
            op: "rotated_shrink",
            size: "1024pairs_8experts_1024to16_forward_backward_flop",
            inputs: vec![
                f(&[T, D]),
                f(&[8, 16, D]),
                f(&[8, 8, D]),
                i(&[T, 2]),
                f(&[2 * T, 16]),
            ],
            limit: 8,
            work: flop(3 * 2 * 2 * T * D * (16 + 8)),
            build: Box::new(|g, v| {
                let segments = g.segments(v[3], 8)?;
                let [u, _] = g.rotated_shrink(v[0], v[1], v[2], segments)?;
                let mut outputs = g.gradients_from(&[(u, v[4])], &v[..3])?;
                outputs.push(u);
                Ok(outputs)
            }),
        },
        Bench {
            op: "rotated_expand",
            size: "1024pairs_8experts_1024to16to1024_forward_backward_flop",
            inputs: vec![
                f(&[T, D]),
                f(&[8, 16, D]),
                f(&[8, 8, D]),
                f(&[8, D, 16]),
                f(&[T, 2]),
                i(&[T, 2]),
                f(&[T, D]),
            ],
            limit: 8,
            work: flop(3 * 2 * 2 * T * D * (16 + 8 + 16)),
            build: Box::new(|g, v| {
                let routed = Routed {
                    gates: v[4],
                    segments: g.segments(v[5], 8)?,
                };
                let [u, _] = g.rotated_shrink(v[0], v[1], v[2], routed.segments)?;
                let y = g.expand(u, v[3], Layout::OutIn, routed, 2.0, None)?;
                let mut outputs = g.gradients_from(&[(y, v[6])], &v[..5])?;
                outputs.push(y);
                Ok(outputs)
            }),
        },
        Bench {
            op: "soft_merge",
            size: "4096x16_8experts_forward_backward_flop",
            inputs: vec![f(&[4096, 16]), f(&[8, 16, 16]), f(&[8, 16]), f(&[4096, 16])],
            limit: 1,
            work: flop(6 * 4096 * 8 * 16 * (16 + 1)),
            build: Box::new(|g, v| {
                let [.., u] = g.soft_merge(v[0], v[1], v[2], CoreMix::Auto)?;
                let mut outputs = g.gradients_from(&[(u, v[3])], &v[..3])?;
                outputs.push(u);
                Ok(outputs)
            }),
        },
        Bench {
            op: "gated_experts",
            size: "1024pairs_8experts_512to256_forward_backward_flop",
            inputs: vec![
                f(&[T, 512]),
                f(&[8, 256, 512]),
                f(&[8, 256, 512]),
                i(&[T, 2]),
                f(&[2 * T, 256]),
            ],
            limit: 8,
            work: flop(3 * 2 * 2 * 2 * T * 512 * 256),
            build: Box::new(|g, v| {
                let segments = g.segments(v[3], 8)?;
                let of = |weight| Projection { x: v[0], weight };
                let h =
                    g.gated_experts(Activation::Silu, of(v[1]), Some(of(v[2])), segments, None)?;
                let mut outputs = g.gradients_from(&[(h, v[4])], &v[..3])?;
                outputs.push(h);
                Ok(outputs)
            }),
        },
        Bench {
            op: "expand_wide",
            size: "1024pairs_8experts_256to512_flop",
            inputs: vec![f(&[2 * T, 256]), f(&[8, 512, 256]), f(&[T, 2]), i(&[T, 2])],
            limit: 8,
            work: flop(2 * 2 * T * 512 * 256),
            build: forward(|g, v| {
                let routed = Routed {
                    gates: v[2],
                    segments: g.segments(v[3], 8)?,
                };
                g.expand(v[0], v[1], Layout::OutIn, routed, 1.0, None)
            }),
        },
        Bench {
            op: "combine",
            size: "32768pairs_16groups_of_64experts_64_forward_backward",
            inputs: vec![
                f(&[4096 * 8, 64]),
                f(&[4096, 8]),
                i(&[4096, 8]),
                f(&[4096 * 8, 64]),
            ],
            limit: 64,
            work: elements(4096 * 8 * 64),
            build: Box::new(|g, v| {
                let segments = g.segments(v[2], 64)?;
                let active = g.active_groups(segments, 64, 16)?;
                let y = g.combine(v[0], v[1], &active)?;
                let mut outputs = g.gradients_from(&[(y, v[3])], &v[..2])?;
                outputs.extend([y, active.segments.order()]);
                Ok(outputs)
            }),
        },
        Bench {
            op: "limit_capacity",
            size: "32768pairs_64experts_by_gate_forward_backward",
            inputs: vec![f(&[4096, 8]), i(&[4096, 8]), f(&[4096, 8])],
            limit: 64,
            work: elements(4096 * 8),
            build: with_gradient(|g, v| {
                let routed = Routed {
                    gates: v[0],
                    segments: g.segments(v[1], 64)?,
                };
                Ok(g.limit_capacity(routed, 64, 512, DropPolicy::Gate)?.gates)
            }),
        },
        Bench {
            op: "router_metrics",
            size: "4096x64_top8",
            inputs: vec![f(&[4096, 64]), i(&[4096, 8])],
            limit: 64,
            work: elements(4096 * 64),
            build: Box::new(|g, v| {
                let segments = g.segments(v[1], 64)?;
                let metrics = g.router_metrics(v[0], segments, None)?;
                Ok(vec![metrics.counts, metrics.entropy])
            }),
        },
        Bench {
            op: "activate",
            size: "1048576_gelu_gated_forward_backward",
            inputs: vec![f(&[1 << 20]), f(&[1 << 20]), f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: with_gradient(|g, v| g.activate(Activation::Gelu, v[0], Some(v[1]))),
        },
        Bench {
            op: "exp",
            size: "1048576",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.exp(v[0])),
        },
        Bench {
            op: "mul_broadcast",
            size: "1024x1024_by_1024",
            inputs: vec![f(&[D, D]), f(&[D])],
            limit: 1,
            work: elements(D * D),
            build: forward(|g, v| g.mul(v[0], v[1])),
        },
        Bench {
            op: "copy",
            size: "1048576",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.copy(v[0])),
        },
        Bench {
            op: "embedding",
            size: "4096rows_of_256_forward_backward",
            inputs: vec![f(&[256, 64]), i(&[4096]), f(&[4096, 64])],
            limit: 256,
            work: elements(4096 * 64),
            build: with_gradient(|g, v| g.embedding(v[0], v[1])),
        },
        Bench {
            op: "tanh",
            size: "512x1024_forward_backward",
            inputs: vec![f(&[T, D]), f(&[T, D])],
            limit: 1,
            work: elements(T * D),
            build: with_gradient(|g, v| g.tanh(v[0])),
        },
        rotate("planes", Rotation::Planes),
        rotate("givens", Rotation::Givens),
        rotate("cayley", Rotation::Cayley),
        rotate("butterfly", Rotation::Butterfly),
        rotate("brick_wall_4", Rotation::BrickWall { layers: 4 }),
        rotate("householder", Rotation::Householder),
    ];
    benches.extend(training::benches());
    benches
}
