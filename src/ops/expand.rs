//! Grouped expand: `y[t] = base[t] + s sum_j g[t, j] W[e(t, j)] z[t k + j]`, added into the base's memory. The [pairs, out] results of
//! single experts are never stored.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::gate_gradient::GateGradient;
use crate::ops::segment_outer::SegmentOuter;
use crate::ops::segments::{expect_segments, gather, host_segments, products, weight_sizes};
use crate::ops::shrink::Shrink;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Layout, Op, Real, Segments, dims_f32, expect_count,
    expect_f32, expect_i32, shader,
};
use crate::tensor::TensorType;

/// Outputs that one invocation computes, as in `shaders/expand.wgsl`.
const TILE: usize = 4;
const WORKGROUP: usize = 64;

/// Inputs: z `[pairs, in]`, weight, experts `[tokens, slots]`, order, offsets, the gates if `gated`, the base if `accumulate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expand {
    pub(crate) layout: Layout,
    pub(crate) scale: f32,
    pub(crate) gated: bool,
    pub(crate) accumulate: bool,
}

impl Graph {
    /// `y[t] = base[t] + scale * sum over the slots j of gates[t, j] W[e(t, j)] z[t k + j]`: `z` is `[pairs, in]`, `gates` `[tokens, slots]`,
    /// the result `[tokens, out]`. It takes over the memory of `base` where `base` is not used again.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit.
    pub fn expand(
        &mut self,
        z: Value,
        weight: Value,
        layout: Layout,
        routed: crate::ops::Routed,
        scale: f32,
        base: Option<Value>,
    ) -> Result<Value> {
        let Segments {
            experts,
            order,
            offsets,
        } = routed.segments;
        let op = Expand {
            layout,
            scale,
            gated: true,
            accumulate: base.is_some(),
        };
        let inputs = [z, weight, experts, order, offsets, routed.gates];
        self.apply1(op, &inputs.into_iter().chain(base).collect::<Vec<_>>())
    }
}

struct Sizes {
    tokens: usize,
    slots: usize,
    experts: usize,
    out: usize,
    input: usize,
}

impl Expand {
    fn base(&self) -> Option<usize> {
        self.accumulate.then_some(5 + usize::from(self.gated))
    }

    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let (experts, out, input) = weight_sizes(name, &inputs[1], self.layout)?;
        let pairs = expect_segments(name, &inputs[3], &inputs[4], experts)?;
        expect_f32(name, "the latents", &inputs[0], &[pairs, input])?;
        let &[tokens, slots] = inputs[2].dims() else {
            return Err(crate::Error::shape(
                name,
                format!("the experts are {}, expected [tokens, slots]", inputs[2]),
            ));
        };
        expect_i32(name, "the experts", &inputs[2], &[tokens, pairs / tokens])?;
        if self.gated {
            expect_f32(name, "the gates", &inputs[5], &[tokens, slots])?;
        }
        Ok(Sizes {
            tokens,
            slots,
            experts,
            out,
            input,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..5 + usize::from(self.gated))
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let Sizes {
            slots, out, input, ..
        } = self.sizes(&types)?;
        let (z, weight, order, offsets) = (io.floats(0)?, io.floats(1)?, io.ints(3)?, io.ints(4)?);
        let gates = if self.gated {
            Some(io.floats(5)?)
        } else {
            None
        };
        let scale = R::of(f64::from(self.scale));
        let segments = host_segments(order, offsets);
        let rows = |pairs: &[i32]| {
            gather(z, input, pairs, 1, |pair| {
                gates.map_or(scale, |gates| scale * gates[pair])
            })
        };
        let parts = products(&segments, weight, (out, input), self.layout, rows);
        let mut row_of_pair: Vec<&[R]> = vec![&[]; order.len()];
        for (pairs, part) in segments.iter().zip(&parts) {
            for (&pair, row) in pairs.iter().zip(part.chunks(out)) {
                row_of_pair[pair as usize] = row;
            }
        }
        let y = io.floats_out(0)?;
        if !self.accumulate {
            y.fill(R::zero());
        }
        y.par_chunks_mut(out)
            .zip(row_of_pair.par_chunks(slots))
            .for_each(|(y, rows)| {
                for row in rows {
                    for (y, &x) in y.iter_mut().zip(*row) {
                        *y += x;
                    }
                }
            });
        Ok(())
    }
}

impl Op for Expand {
    fn name(&self) -> &'static str {
        "expand"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(
            self.name(),
            inputs,
            5 + usize::from(self.gated) + usize::from(self.accumulate),
        )?;
        let Sizes { tokens, out, .. } = self.sizes(inputs)?;
        if let Some(base) = self.base() {
            expect_f32(self.name(), "the base", &inputs[base], &[tokens, out])?;
        }
        Ok(vec![TensorType::f32([tokens, out])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let [z, weight, experts, order, offsets] =
            [0, 1, 2, 3, 4].map(|input| context.input(input));
        let gates = self.gated.then(|| context.input(5));
        if context.wants(0) || (self.gated && context.wants(5)) {
            // v = W^T dy for every pair: the gate needs only its product with z, never the expert's [tokens, out] output.
            let shrink = Shrink {
                layout: self.layout.flipped(),
            };
            let v = context
                .graph
                .apply1(shrink, &[dy, weight, experts, order, offsets])?;
            let mut dz = v;
            if let Some(gates) = gates {
                let [tokens, _] = dims_f32(self.name(), "the gates", context.graph.ty(gates)?)?;
                let outputs = context
                    .graph
                    .apply(GateGradient { scale: self.scale }, &[v, z, gates])?;
                dz = outputs[0];
                if context.wants(5) {
                    let slots = context.graph.ty(gates)?.shape.last();
                    let d_gates = context.graph.reshape(outputs[1], [tokens, slots])?;
                    context.add(5, d_gates)?;
                }
            } else if self.scale.to_bits() != 1.0_f32.to_bits() {
                dz = context.graph.scale(v, self.scale)?;
            }
            if context.wants(0) {
                context.add(0, dz)?;
            }
        }
        if context.wants(1) {
            let (left, right) = if self.layout == Layout::OutIn {
                (dy, z)
            } else {
                (z, dy)
            };
            let op = SegmentOuter {
                scale: self.scale,
                gated: self.gated,
            };
            let inputs = [left, right, order, offsets];
            let gradient = context
                .graph
                .apply1(op, &inputs.into_iter().chain(gates).collect::<Vec<_>>())?;
            context.add(1, gradient)?;
        }
        if let Some(base) = self.base()
            && context.wants(base)
        {
            context.add(base, dy)?;
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        self.base()
            .map(|input| Alias {
                input,
                output: 0,
                kind: AliasKind::Accumulate,
            })
            .into_iter()
            .collect()
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let Sizes {
            tokens,
            slots,
            experts,
            out,
            input,
        } = self.sizes(io.inputs)?;
        let lanes_out = out.div_ceil(TILE).next_power_of_two().min(WORKGROUP);
        let lanes_tokens = (WORKGROUP / lanes_out).min(tokens.next_power_of_two());
        let out_groups = out.div_ceil(lanes_out * TILE);
        let weight_row = if self.layout == Layout::OutIn {
            input
        } else {
            out
        };
        let aligned = input % 4 == 0 && weight_row % 4 == 0;
        // Without gates the binding is not read: any buffer will do.
        let gates = if self.gated {
            Slot::Input(5)
        } else {
            Slot::Input(0)
        };
        let launch = Launch::new(shader!("expand"), "forward")
            .constant("LANES_OUT", lanes_out as f64)
            .constant("LANES_TOKENS", lanes_tokens as f64)
            .constant("OUT_IN", self.layout == Layout::OutIn)
            .constant("ALIGNED", aligned)
            .constant("GATED", self.gated)
            .constant("ACCUMULATE", self.accumulate)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, gates)
            .write(5, Slot::Output(0))
            .param(tokens)
            .param(slots)
            .param(experts)
            .param(out)
            .param(input)
            .param(self.scale)
            .param(out_groups)
            .folded(tokens.div_ceil(lanes_tokens) * out_groups, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
