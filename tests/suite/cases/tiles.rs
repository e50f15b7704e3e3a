//! Every size of tile and workgroup that operations choose by their operands' shapes, at the smallest shapes that get it: one case an operation,
//! in both directions. `shaders::cases_reach_every_tile` says which are missing.

use rankmix::ops::{Activation, CoreMix, Layout, MatMul, Projection, Rotation, Routed};
use rankmix::{Graph, Result, Tensor, Value};

use crate::case::{Case, floats, floats_in, ints};

type Build = Box<dyn Fn(&mut Graph, &[Value]) -> Result<Value> + Send + Sync>;

/// One operation at many shapes.
#[derive(Default)]
struct Shapes {
    inputs: Vec<Tensor>,
    builds: Vec<(usize, Build)>,
}

impl Shapes {
    /// The operation on these inputs.
    fn add(
        &mut self,
        inputs: Vec<Tensor>,
        build: impl Fn(&mut Graph, &[Value]) -> Result<Value> + Send + Sync + 'static,
    ) {
        self.builds.push((inputs.len(), Box::new(build)));
        self.inputs.extend(inputs);
    }

    /// All of them in one graph: the results, and the gradients of all float inputs for an upstream gradient of half the result.
    fn case(self, name: &str) -> Case {
        let Self { inputs, builds } = self;
        let is_float: Vec<bool> = inputs
            .iter()
            .map(|tensor| tensor.as_i32().is_none())
            .collect();
        let build = move |graph: &mut Graph, values: &[Value]| {
            let mut results = Vec::new();
            let mut first = 0;
            for (count, build) in &builds {
                let own = first..first + count;
                first = own.end;
                let y = build(graph, &values[own.clone()])?;
                let upstream = graph.scale(y, 0.5)?;
                let floats: Vec<Value> = own
                    .filter(|&input| is_float[input])
                    .map(|input| values[input])
                    .collect();
                results.extend(graph.gradients_from(&[(y, upstream)], &floats)?);
                results.push(y);
            }
            Ok(results)
        };
        Case::new(format!("tiles_of_{name}"), inputs, build).forward_only()
    }
}

fn powers(from: usize, to: usize) -> impl Iterator<Item = usize> + Clone {
    (0..usize::BITS)
        .map(|exponent| 1 << exponent)
        .filter(move |size| (from..=to).contains(size))
}

/// Results of a row, and the inner dimension, where that is split over invocations: the longer it is, the more of them lie along it.
const LONG: [(usize, usize); 9] = [
    (4, 64),
    (8, 64),
    (16, 64),
    (32, 64),
    (64, 64),
    (4, 128),
    (8, 128),
    (16, 128),
    (4, 512),
];

fn matrix_products() -> Case {
    let mut shapes = Shapes::default();
    let options = MatMul {
        transpose_b: true,
        ..MatMul::default()
    };
    // Small results have small workgroups; a batch makes enough of them.
    for (batch, most_rows) in [(1, 256), (16, 256), (32, 512)] {
        for m in powers(8, most_rows) {
            for n in powers(8, 64) {
                if batch == 1 || m * n == 4096 || (n == 8 && m < 512) {
                    let inputs = vec![floats(&[batch, m, 4], 240), floats(&[batch, n, 4], 241)];
                    shapes.add(inputs, move |graph, v| {
                        graph.matmul_with(v[0], v[1], options, None)
                    });
                }
            }
        }
    }
    for (n, k) in LONG {
        let inputs = vec![floats(&[3, k], 258), floats(&[n, k], 259)];
        shapes.add(inputs, move |graph, v| {
            graph.matmul_with(v[0], v[1], options, None)
        });
    }
    shapes.case("matmul")
}

/// Rows of a length for which a workgroup has another size.
fn rows(length: usize) -> Vec<Case> {
    let logits = || floats_in(&[3, length], 242, -3.0, 3.0);
    let chosen = || ints(&[3, 2], 243, length as u32);
    let mut losses = Shapes::default();
    losses.add(vec![logits()], |graph, v| graph.z_loss(v[0]));
    losses.add(vec![logits(), chosen()], move |graph, v| {
        Ok(graph.balance_loss(v[0], v[1])?.loss)
    });
    let inputs = vec![
        ints(&[3, 2], 244, 4),
        floats(&[3, 2], 245),
        floats(&[6, length], 246),
    ];
    let mut combine = Shapes::default();
    combine.add(inputs, move |graph, v| {
        let segments = graph.segments(v[0], 4)?;
        let groups = graph.active_groups(segments, 4, 2)?;
        graph.combine(v[2], v[1], &groups)
    });
    let metrics = Case::new(
        format!("tiles_of_router_metrics_{length}"),
        vec![logits(), chosen()],
        move |graph, v| {
            let chosen = graph.segments(v[1], length)?;
            let metrics = graph.router_metrics(v[0], chosen, None)?;
            Ok(vec![metrics.counts, metrics.dropped, metrics.entropy])
        },
    );
    vec![
        losses.case(&format!("router_losses_{length}")),
        combine.case(&format!("combine_{length}")),
        metrics.forward_only(),
    ]
}

/// Products by segments; their gradients are the others' products, and the outer products.
fn grouped_products() -> Vec<Case> {
    const EXPERTS: usize = 2;
    let chosen = |tokens| ints(&[tokens, 1], 247, EXPERTS as u32);
    let [mut shrink, mut gated, mut expand, mut rotated] = [(); 4].map(|()| Shapes::default());
    for tokens in powers(1, 512) {
        for out in powers(4, 256) {
            if tokens * out > 8192 {
                continue;
            }
            let inputs = |input| {
                vec![
                    chosen(tokens),
                    floats(&[tokens, input], 248),
                    floats(&[EXPERTS, out, input], 249),
                ]
            };
            shrink.add(inputs(4), |graph, v| {
                let segments = graph.segments(v[0], EXPERTS)?;
                graph.shrink(v[1], v[2], Layout::OutIn, segments)
            });
            let mut with_angles = inputs(4);
            with_angles.push(floats(&[EXPERTS, out / 2, 4], 253));
            rotated.add(with_angles, |graph, v| {
                let segments = graph.segments(v[0], EXPERTS)?;
                Ok(graph.rotated_shrink(v[1], v[2], v[3], segments)?[0])
            });
            gated.add(inputs(4), |graph, v| {
                let segments = graph.segments(v[0], EXPERTS)?;
                let gate = Projection {
                    x: v[1],
                    weight: v[2],
                };
                graph.gated_experts(Activation::Silu, gate, None, segments, None)
            });
            if tokens <= 64 {
                let mut inputs = inputs(4);
                inputs.push(floats(&[tokens, 1], 250));
                expand.add(inputs, |graph, v| {
                    let segments = graph.segments(v[0], EXPERTS)?;
                    let gates = v[3];
                    graph.expand(
                        v[1],
                        v[2],
                        Layout::OutIn,
                        Routed { gates, segments },
                        1.5,
                        None,
                    )
                });
            }
        }
    }
    for (out, input) in LONG {
        let inputs = vec![
            chosen(3),
            floats(&[3, input], 260),
            floats(&[EXPERTS, out, input], 261),
        ];
        shrink.add(inputs.clone(), |graph, v| {
            let segments = graph.segments(v[0], EXPERTS)?;
            graph.shrink(v[1], v[2], Layout::OutIn, segments)
        });
        let mut with_angles = inputs;
        with_angles.push(floats_in(&[EXPERTS, out / 2, input], 262, -0.4, 0.4));
        rotated.add(with_angles, |graph, v| {
            let segments = graph.segments(v[0], EXPERTS)?;
            Ok(graph.rotated_shrink(v[1], v[2], v[3], segments)?[0])
        });
    }
    let mut outer = Shapes::default();
    for input in powers(4, 64) {
        for out in powers(4, 256) {
            let inputs = vec![
                chosen(3),
                floats(&[3, input], 251),
                floats(&[EXPERTS, out, input], 252),
            ];
            outer.add(inputs, |graph, v| {
                let segments = graph.segments(v[0], EXPERTS)?;
                graph.shrink(v[1], v[2], Layout::OutIn, segments)
            });
        }
    }
    vec![
        shrink.case("shrink"),
        rotated.case("rotated_shrink"),
        gated.case("gated_experts"),
        expand.case("expand"),
        outer.case("segment_outer"),
    ]
}

/// Up to the longest chain that llvmpipe runs: it stops every loop after 65,535 turns.
fn givens() -> Case {
    let mut shapes = Shapes::default();
    for rank in powers(64, 256) {
        let rotation = Rotation::Givens;
        let numbers = rotation.numbers(rank).expect("every rank suits a chain");
        // More rows than a workgroup takes.
        let angles = floats_in(&[33, numbers], 254, -0.1, 0.3);
        let inputs = vec![floats(&[33, rank], 253), angles];
        shapes.add(inputs, move |graph, v| graph.rotate(rotation, v[0], v[1]));
    }
    shapes.case("rotate_givens")
}

fn cores() -> Vec<Case> {
    let [mut alone, mut routed] = [(); 2].map(|()| Shapes::default());
    for (tokens, rank) in [(3, 8), (3, 32), (512, 8), (128, 32), (300, 128), (3, 128)] {
        let inputs = vec![
            floats(&[tokens, rank], 255),
            floats(&[4, rank, rank], 256),
            floats(&[tokens, 4], 257),
        ];
        alone.add(inputs, |graph, v| {
            graph.mix_cores(v[0], v[1], v[2], CoreMix::Apply)
        });
    }
    // Four tokens an invocation, of 4 elements each, where that leaves 8,192 invocations.
    let with_four = |rank: usize| 4 * 8192 / (rank / 4);
    let few_experts = powers(4, 64).map(|rank| (rank, 4));
    for (rank, experts) in few_experts.chain([(4, 64), (16, 64)]) {
        for tokens in [3, 40, with_four(rank)] {
            for mix in [CoreMix::Merge, CoreMix::Apply] {
                let inputs = vec![
                    floats(&[tokens, rank], 258),
                    floats(&[experts, rank, rank], 259),
                    floats(&[experts, rank], 260),
                ];
                routed.add(inputs, move |graph, v| {
                    Ok(graph.soft_merge(v[0], v[1], v[2], mix)?[2])
                });
            }
        }
    }
    vec![alone.case("mix_cores"), routed.case("soft_merge")]
}

pub fn cases() -> Vec<Case> {
    let mut cases = vec![matrix_products(), givens()];
    cases.extend(cores());
    for length in [64, 1025] {
        cases.extend(rows(length));
    }
    cases.extend(grouped_products());
    cases
}
