//! Graphs over a sweep of shapes, for their kernels alone: every size of tile and workgroup that an operation chooses by its operands'
//! shapes. They are never run; the cases are.

use std::slice::from_ref;

use rankmix::ops::Rotation;
use rankmix::ops::{Activation, CoreMix, Layout, MatMul, Projection, Routed};
use rankmix::{DType, Graph, Precision, Result, TensorType, Value};

/// Powers of two, which is what tiles are counted in.
fn powers(from: usize, to: usize) -> impl Iterator<Item = usize> + Clone {
    (0..usize::BITS)
        .map(|exponent| 1 << exponent)
        .filter(move |size| (from..=to).contains(size))
}

/// One operation, forward and backward, with every float in the precision's storage.
struct Sweep {
    precision: Precision,
    graphs: Vec<Graph>,
}

impl Sweep {
    fn add(
        &mut self,
        inputs: &[TensorType],
        build: impl Fn(&mut Graph, &[Value]) -> Result<Value>,
    ) {
        let graph = self
            .graph(inputs, build)
            .expect("the shapes suit the operations");
        self.graphs.push(graph);
    }

    fn graph(
        &self,
        inputs: &[TensorType],
        build: impl Fn(&mut Graph, &[Value]) -> Result<Value>,
    ) -> Result<Graph> {
        let mut graph = Graph::new();
        graph.set_precision(self.precision);
        let mut values = Vec::new();
        for (index, ty) in inputs.iter().enumerate() {
            let value = graph.input(&format!("input{index}"), ty.clone())?;
            // What is given stays in 32 bits, what is computed does not.
            values.push(match ty.dtype {
                DType::I32 => value,
                _ => graph.scale(value, 1.0)?,
            });
        }
        let y = build(&mut graph, &values)?;
        let upstream = graph.input("upstream", graph.ty(y)?.clone())?;
        let upstream = graph.scale(upstream, 1.0)?;
        let floats = values
            .iter()
            .zip(inputs)
            .filter(|(_, ty)| ty.dtype != DType::I32);
        let floats: Vec<Value> = floats.map(|(&value, _)| value).collect();
        let gradients = graph.gradients_from(&[(y, upstream)], &floats)?;
        for value in gradients.into_iter().chain([y]) {
            graph.output(value)?;
        }
        Ok(graph)
    }

    fn matrix_products(&mut self) {
        for m in powers(1, 1024) {
            for n in powers(1, 128) {
                for batch in [1, 64] {
                    let inputs = [
                        TensorType::f32([batch, m, 32]),
                        TensorType::f32([batch, n, 32]),
                    ];
                    let options = MatMul {
                        transpose_b: true,
                        ..MatMul::default()
                    };
                    self.add(&inputs, |graph, v| {
                        graph.matmul_with(v[0], v[1], options, None)
                    });
                }
            }
        }
    }

    /// Reductions of rows, whose workgroups grow with the length.
    fn rows(&mut self) {
        // By a workgroup, and by an invocation on software adapters.
        for (count, length) in [(64, 64), (64, 4100)] {
            let rows = TensorType::f32([count, length]);
            self.add(from_ref(&rows), |graph, v| graph.softmax(v[0]));
            self.add(&[rows.clone(), TensorType::f32([length])], |graph, v| {
                graph.rms_norm(v[0], v[1], 1e-6)
            });
            self.add(from_ref(&rows), |graph, v| graph.sum(v[0], &[0]));
            self.add(from_ref(&rows), |graph, v| graph.sum(v[0], &[1]));
        }
        for length in [32, 64, 1025] {
            let rows = TensorType::f32([3, length]);
            self.add(from_ref(&rows), |graph, v| graph.softmax(v[0]));
            self.add(&[rows.clone(), TensorType::f32([length])], |graph, v| {
                graph.rms_norm(v[0], v[1], 1e-6)
            });
            self.add(&[rows.clone(), TensorType::i32([3])], |graph, v| {
                graph.cross_entropy(v[0], v[1])
            });
            self.add(from_ref(&rows), |graph, v| graph.z_loss(v[0]));
            self.add(&[rows.clone(), TensorType::i32([3, 2])], |graph, v| {
                Ok(graph.balance_loss(v[0], v[1])?.loss)
            });
            self.add(&[rows.clone(), TensorType::i32([3, 2])], |graph, v| {
                let chosen = graph.segments(v[1], length)?;
                let metrics = graph.router_metrics(v[0], chosen, None)?;
                graph.output(metrics.counts)?;
                graph.output(metrics.entropy)?;
                graph.sum_all(v[0])
            });
            let latents = TensorType::f32([6, length]);
            let inputs = [TensorType::i32([3, 2]), TensorType::f32([3, 2]), latents];
            self.add(&inputs, |graph, v| {
                let segments = graph.segments(v[0], 4)?;
                let groups = graph.active_groups(segments, 4, 2)?;
                graph.combine(v[2], v[1], &groups)
            });
        }
    }

    /// Routing and sorting, which one workgroup does up to some sizes; its memory grows with the experts and the pairs.
    fn routes(&mut self) {
        for tokens in powers(1, 8192) {
            for experts in powers(1, 128) {
                let logits = TensorType::f32([tokens, experts]);
                let top_k = experts.min(8);
                self.add(from_ref(&logits), |graph, v| {
                    let routed = graph.route(v[0], top_k, true)?;
                    graph.output(routed.segments.order())?;
                    Ok(routed.gates)
                });
            }
        }
        for count in powers(1, 1 << 20) {
            for limit in powers(1, 1 << 16) {
                let inputs = [TensorType::i32([count]), TensorType::f32([1])];
                self.add(&inputs, |graph, v| {
                    let sorted = graph.sort_by_key(v[0], limit)?;
                    graph.output(sorted.order)?;
                    graph.output(sorted.offsets)?;
                    graph.square(v[1])
                });
            }
        }
    }

    /// Products by segments; their gradients are the others' products, and the outer products.
    fn grouped_products(&mut self) {
        const EXPERTS: usize = 4;
        for tokens in powers(1, 1024) {
            for out in powers(1, 256) {
                let chosen = TensorType::i32([tokens, 1]);
                let weight = TensorType::f32([EXPERTS, out, 64]);
                let inputs = [
                    chosen.clone(),
                    TensorType::f32([tokens, 64]),
                    weight.clone(),
                ];
                self.add(&inputs, |graph, v| {
                    let segments = graph.segments(v[0], EXPERTS)?;
                    graph.shrink(v[1], v[2], Layout::OutIn, segments)
                });
                if out % 4 == 0 {
                    let angles = TensorType::f32([EXPERTS, out / 2, 64]);
                    let inputs: Vec<TensorType> = inputs.iter().cloned().chain([angles]).collect();
                    self.add(&inputs, |graph, v| {
                        let segments = graph.segments(v[0], EXPERTS)?;
                        Ok(graph.rotated_shrink(v[1], v[2], v[3], segments)?[0])
                    });
                }
                self.add(&inputs, |graph, v| {
                    let segments = graph.segments(v[0], EXPERTS)?;
                    let gate = Projection {
                        x: v[1],
                        weight: v[2],
                    };
                    graph.gated_experts(Activation::Silu, gate, None, segments, None)
                });
                for input in [16, 64] {
                    let weight = TensorType::f32([EXPERTS, out, input]);
                    let gates = TensorType::f32([tokens, 1]);
                    let inputs = [
                        chosen.clone(),
                        gates,
                        TensorType::f32([tokens, input]),
                        weight,
                    ];
                    self.add(&inputs, |graph, v| {
                        let segments = graph.segments(v[0], EXPERTS)?;
                        let gates = v[1];
                        graph.expand(
                            v[2],
                            v[3],
                            Layout::OutIn,
                            Routed { gates, segments },
                            1.0,
                            None,
                        )
                    });
                }
            }
        }
        for input in powers(1, 128) {
            for out in powers(1, 256) {
                let inputs = [
                    TensorType::i32([8, 1]),
                    TensorType::f32([8, input]),
                    TensorType::f32([EXPERTS, out, input]),
                ];
                self.add(&inputs, |graph, v| {
                    let segments = graph.segments(v[0], EXPERTS)?;
                    graph.shrink(v[1], v[2], Layout::OutIn, segments)
                });
            }
        }
    }

    fn rotations(&mut self) {
        for rotation in Rotation::ALL {
            for rank in powers(2, 2048) {
                if rotation == Rotation::Cayley && rank > 64 {
                    continue;
                }
                let numbers = rotation.numbers(rank).expect("a power of two suits all");
                let inputs = [TensorType::f32([3, rank]), TensorType::f32([3, numbers])];
                self.add(&inputs, |graph, v| graph.rotate(rotation, v[0], v[1]));
            }
        }
    }

    fn cores(&mut self) {
        for rank in powers(1, 128) {
            for tokens in [8, 1 << 16] {
                for mix in [CoreMix::Merge, CoreMix::Apply] {
                    let inputs = [
                        TensorType::f32([tokens, rank]),
                        TensorType::f32([4, rank, rank]),
                        TensorType::f32([tokens, 4]),
                    ];
                    self.add(&inputs, |graph, v| graph.mix_cores(v[0], v[1], v[2], mix));
                }
            }
        }
        let few_experts = powers(1, 64).map(|rank| (rank, 4));
        for (rank, experts) in few_experts.chain([(4, 64), (16, 64)]) {
            for tokens in [8, 1 << 16] {
                for mix in [CoreMix::Merge, CoreMix::Apply] {
                    let inputs = [
                        TensorType::f32([tokens, rank]),
                        TensorType::f32([experts, rank, rank]),
                        TensorType::f32([experts, rank]),
                    ];
                    self.add(&inputs, |graph, v| {
                        Ok(graph.soft_merge(v[0], v[1], v[2], mix)?[2])
                    });
                }
            }
        }
    }
}

/// The graphs, with values stored as `precision` says.
pub fn graphs(precision: Precision) -> Vec<Graph> {
    let mut sweep = Sweep {
        precision,
        graphs: Vec::new(),
    };
    sweep.matrix_products();
    sweep.rows();
    sweep.routes();
    sweep.grouped_products();
    sweep.rotations();
    sweep.cores();
    sweep.graphs
}
