//! Grouped expand: `y[t] = base[t] + s sum_j g[t, j] W[e(t, j)] z[t k + j]`, added into the base's memory.
//!
//! There are two forms. For narrow latents (a rank) one kernel sums over a token's slots, and the [pairs, out] results of single
//! experts are never stored. It reads an expert's matrix once for every token, so for wide ones (the intermediate width of a
//! feed-forward expert) the products are made by segments into scratch memory, and summed by a second kernel.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::combine::{CombineOperands, CombineSizes};
use crate::ops::segment_outer::SegmentOuter;
use crate::ops::segments::{RowOf, expect_segments, gather, host_segments, products, weight_sizes};
use crate::ops::shrink::{self, Shrink};
use crate::ops::subgroup_tile::subgroup_tiles;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Layout, Op, Real, Segments, Work, expect_count,
    expect_f32, expect_i32, shader,
};
use crate::tensor::TensorType;

/// Outputs that one invocation computes, as in `shaders/expand.wgsl`.
const TILE: usize = 4;
const WORKGROUP: usize = 64;
/// Latents up to this width are expanded in one kernel. On software Vulkan (1,024 pairs to width 256) one kernel takes 6.3 ms at width 16, where
/// two take 11.7, and 28.6 ms at width 64, where two take 19.6.
const NARROW: usize = 32;
/// Scratch memory that the two launches may take; beyond it one kernel does it all.
pub(crate) const MAX_SCRATCH_BYTES: u64 = 256 << 20;
/// With fewer tokens there is little to be read again.
const FEW_TOKENS: usize = 16;

/// Inputs: z `[pairs, in]`, weight, experts `[tokens, slots]`, order, offsets, the gates if `gated`, the row of each pair if there are
/// `rows_per_token`, the base if `accumulate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expand {
    pub(crate) layout: Layout,
    pub(crate) scale: f32,
    pub(crate) gated: bool,
    pub(crate) accumulate: bool,
    pub(crate) none: bool,
    /// How many rows of the result a token has, where each pair says into which it is summed; else one, for all its pairs.
    pub(crate) rows_per_token: Option<usize>,
}

impl Graph {
    /// `y[t] = base[t] + scale * sum over the slots j of gates[t, j] W[e(t, j)] z[t k + j]`: `z` is `[pairs, in]`, `gates` `[tokens, slots]`,
    /// the result `[tokens, out]`. Nothing is added for pairs of no expert. It takes over the memory of `base` where `base` is not used again.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
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
            none,
        } = routed.segments;
        let op = Expand {
            layout,
            scale,
            gated: true,
            accumulate: base.is_some(),
            none,
            rows_per_token: None,
        };
        let inputs = [z, weight, experts, order, offsets, routed.gates];
        self.apply1(op, &inputs.into_iter().chain(base).collect::<Vec<_>>())
    }
}

impl Graph {
    /// [`Graph::expand`] with gates that are 1: `y[t] = sum over the slots j of W[e(t, j)] z[t slots + j]`, the experts of the segments being
    /// `[tokens, slots]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn expand_ungated(
        &mut self,
        z: Value,
        weight: Value,
        layout: Layout,
        segments: Segments,
    ) -> Result<Value> {
        let op = Expand {
            layout,
            scale: 1.0,
            gated: false,
            accumulate: false,
            none: segments.none,
            rows_per_token: None,
        };
        let Segments {
            experts,
            order,
            offsets,
            ..
        } = segments;
        self.apply1(op, &[z, weight, experts, order, offsets])
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) tokens: usize,
    pub(crate) slots: usize,
    pub(crate) experts: usize,
    pub(crate) out: usize,
    pub(crate) input: usize,
}

/// Where the operands are; the result is output 0.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) z: Slot,
    pub(crate) weight: Slot,
    pub(crate) experts: Slot,
    pub(crate) order: Slot,
    pub(crate) offsets: Slot,
    pub(crate) gates: Option<Slot>,
    pub(crate) map: Option<Slot>,
}

impl Expand {
    /// The number of the input that says into which row each pair is summed.
    fn map(&self) -> Option<usize> {
        self.rows_per_token.map(|_| 5 + usize::from(self.gated))
    }

    fn base(&self) -> Option<usize> {
        self.accumulate
            .then_some(5 + usize::from(self.gated) + usize::from(self.rows_per_token.is_some()))
    }

    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let (experts, out, input) = weight_sizes(name, &inputs[1], self.layout)?;
        let pairs = expect_segments(name, &inputs[3], &inputs[4], experts, self.none)?;
        expect_f32(name, "the latents", &inputs[0], &[pairs, input])?;
        let &[tokens, slots] = inputs[2].dims() else {
            return Err(Error::shape(
                name,
                format!("the experts are {}, expected [tokens, slots]", inputs[2]),
            ));
        };
        expect_i32(name, "the experts", &inputs[2], &[tokens, pairs / tokens])?;
        if self.gated {
            expect_f32(name, "the gates", &inputs[5], &[tokens, slots])?;
        }
        if let Some(map) = self.map() {
            expect_i32(name, "the rows", &inputs[map], &[tokens, slots])?;
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
        let types: Vec<TensorType> = (0..self.base().unwrap_or_else(|| self.count()))
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let Sizes {
            slots,
            experts,
            out,
            input,
            ..
        } = self.sizes(&types)?;
        let (z, weight, order, offsets) = (io.floats(0)?, io.floats(1)?, io.ints(3)?, io.ints(4)?);
        let gates = if self.gated {
            Some(io.floats(5)?)
        } else {
            None
        };
        let map = self.map().map(|map| io.ints(map)).transpose()?;
        let scale = R::of(f64::from(self.scale));
        let segments = host_segments(order, offsets);
        let rows = |pairs: &[i32]| {
            gather(z, input, pairs, RowOf::Share(1), |pair| {
                gates.map_or(scale, |gates| scale * gates[pair])
            })
        };
        let parts = products(
            &segments[..experts],
            weight,
            (out, input),
            self.layout,
            rows,
        );
        let y = io.floats_out(0)?;
        if !self.accumulate {
            y.fill(R::zero());
        }
        let per_token = self.rows_per_token.unwrap_or(1);
        add_products(y, out, (&segments, &parts), slots, per_token, map);
        Ok(())
    }
}

/// Adds the products of each segment's pairs to the rows of their tokens, slot by slot; with a map, each to the one of its token's rows that
/// it names.
pub(crate) fn add_products<R: Real>(
    y: &mut [R],
    out: usize,
    (segments, parts): (&[&[i32]], &[Vec<R>]),
    slots: usize,
    rows_per_token: usize,
    map: Option<&[i32]>,
) {
    let pairs = y.len() / out / rows_per_token * slots;
    // Empty for a pair of no expert.
    let mut row_of_pair: Vec<&[R]> = vec![&[]; pairs];
    for (pairs, part) in segments.iter().zip(parts) {
        for (&pair, row) in pairs.iter().zip(part.chunks(out)) {
            row_of_pair[pair as usize] = row;
        }
    }
    y.par_chunks_mut(out).enumerate().for_each(|(row, y)| {
        let token = row / rows_per_token;
        for pair in token * slots..(token + 1) * slots {
            if map.is_some_and(|rows| rows[pair] as usize != row) {
                continue;
            }
            for (y, &x) in y.iter_mut().zip(row_of_pair[pair]) {
                *y += x;
            }
        }
    });
}

impl Op for Expand {
    fn name(&self) -> &'static str {
        "expand"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            slots,
            experts,
            out,
            input,
        } = self.sizes(io.inputs)?;
        let pairs = tokens * slots;
        let gate = usize::from(self.gated) * out.min(input);
        // The experts say everything that order and offsets do.
        Ok(Work::moving(io)
            .reading(1, experts.min(pairs) * out * input)
            .reading(3, 0)
            .reading(4, 0)
            .with_flops(pairs * (2 * out * input + gate)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, self.count())?;
        let Sizes { tokens, out, .. } = self.sizes(inputs)?;
        let rows = tokens * self.rows_per_token.unwrap_or(1);
        if let Some(base) = self.base() {
            expect_f32(self.name(), "the base", &inputs[base], &[rows, out])?;
        }
        Ok(vec![TensorType::f32([rows, out])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        if self.rows_per_token.is_some() {
            // Only ever the gradient of something itself.
            return Err(Error::NoGradient { op: self.name() });
        }
        let [z, weight, experts, order, offsets] =
            [0, 1, 2, 3, 4].map(|input| context.input(input));
        let gates = self.gated.then(|| context.input(5));
        if context.wants(0) || (self.gated && context.wants(5)) {
            // v = W^T dy for every pair: the gate needs only its product with z, never the expert's [tokens, out] output.
            let shrink = Shrink {
                layout: self.layout.flipped(),
                none: self.none,
            };
            let v = context
                .graph
                .apply1(shrink, &[dy, weight, experts, order, offsets])?;
            let mut dz = v;
            if let Some(gates) = gates {
                let d_gates;
                [dz, d_gates] = context.graph.gate_gradient(v, z, gates, self.scale)?;
                if context.wants(5) {
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
                none: self.none,
                right_mapped: false,
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
        let operands = Operands {
            z: Slot::Input(0),
            weight: Slot::Input(1),
            experts: Slot::Input(2),
            order: Slot::Input(3),
            offsets: Slot::Input(4),
            gates: self.gated.then_some(Slot::Input(5)),
            map: self.map().map(Slot::Input),
        };
        let mut launches = Launches::default();
        self.add_launches(
            &mut launches,
            &self.sizes(io.inputs)?,
            operands,
            capabilities,
        )?;
        Ok(launches)
    }

    host_reference!();
}

impl Expand {
    fn count(&self) -> usize {
        5 + usize::from(self.gated)
            + usize::from(self.rows_per_token.is_some())
            + usize::from(self.accumulate)
    }

    /// The kernels, in one form or the other: here, and for two products that are summed.
    pub(crate) fn add_launches(
        &self,
        launches: &mut Launches,
        sizes: &Sizes,
        operands: Operands,
        capabilities: &Capabilities,
    ) -> Result<()> {
        let scratch_bytes = (sizes.tokens * sizes.slots * sizes.out) as u64 * 4;
        let narrow = if subgroup_tiles(capabilities) {
            0
        } else {
            NARROW
        };
        if sizes.input > narrow
            && sizes.tokens >= FEW_TOKENS
            && scratch_bytes <= capabilities.max_binding_bytes.min(MAX_SCRATCH_BYTES)
        {
            self.wide(launches, sizes, operands, capabilities)
        } else {
            let launch = self.narrow(sizes, operands, capabilities)?;
            launches.launches.push(launch);
            Ok(())
        }
    }

    /// One kernel: every row of the result is the sum over its token's slots.
    fn narrow(
        &self,
        sizes: &Sizes,
        operands: Operands,
        capabilities: &Capabilities,
    ) -> Result<Launch> {
        let &Sizes {
            tokens,
            slots,
            experts,
            out,
            input,
        } = sizes;
        let per_token = self.rows_per_token.unwrap_or(1);
        let rows = tokens * per_token;
        let lanes_out = out.div_ceil(TILE).next_power_of_two().min(WORKGROUP);
        let lanes_rows = (WORKGROUP / lanes_out).min(rows.next_power_of_two());
        let out_groups = out.div_ceil(lanes_out * TILE);
        let weight_row = if self.layout == Layout::OutIn {
            input
        } else {
            out
        };
        let aligned = input % 4 == 0 && weight_row % 4 == 0;
        // Without gates or a map their bindings are not read: any buffer will do.
        let gates = operands.gates.unwrap_or(operands.z);
        let map = operands.map.unwrap_or(operands.experts);
        Launch::new(shader!("expand"), "forward")
            .constant("LANES_OUT", lanes_out as f64)
            .constant("LANES_ROWS", lanes_rows as f64)
            .constant("OUT_IN", self.layout == Layout::OutIn)
            .constant("ALIGNED", aligned)
            .constant("GATED", self.gated)
            .constant("MAPPED", self.rows_per_token.is_some())
            .constant("ACCUMULATE", self.accumulate)
            .read(1, operands.z)
            .read(2, operands.weight)
            .read(3, operands.experts)
            .read(4, gates)
            .write(5, Slot::Output(0))
            .read(6, map)
            .param(rows)
            .param(per_token)
            .param(slots)
            .param(experts)
            .param(out)
            .param(input)
            .param(self.scale)
            .param(out_groups)
            .folded(rows.div_ceil(lanes_rows) * out_groups, capabilities)
    }

    /// Two kernels: products by segments into scratch memory, then the sum.
    fn wide(
        &self,
        launches: &mut Launches,
        sizes: &Sizes,
        at: Operands,
        capabilities: &Capabilities,
    ) -> Result<()> {
        let &Sizes {
            tokens,
            slots,
            experts,
            out,
            input,
        } = sizes;
        let products = launches.scratch_words(tokens * slots * out);
        let shrink = Shrink {
            layout: self.layout,
            none: self.none,
        };
        let product = shrink::Sizes {
            pairs: tokens * slots,
            share: 1,
            experts,
            out,
            input,
        };
        let operands = [at.z, at.weight, at.order, at.offsets];
        launches
            .launches
            .push(shrink.launch(&product, operands, products, capabilities)?);
        let sum = CombineSizes {
            tokens,
            rows_per_token: self.rows_per_token.unwrap_or(1),
            slots,
            width: out,
        };
        let operands = CombineOperands {
            u: products,
            gates: at.gates,
            rows: at.map,
            unread: at.order,
            y: Slot::Output(0),
        };
        let settings = (self.scale, self.accumulate);
        launches
            .launches
            .push(sum.launch(operands, settings, capabilities)?);
        Ok(())
    }
}
