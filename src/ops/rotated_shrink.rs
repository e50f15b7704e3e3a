//! Grouped shrink and a rotation in planes whose angles come from the same rows: `u[p] = R(V[e] x) A[e] x`, in one kernel where the sizes
//! allow it. What is rotated is not kept: the gradient needs only the result and the angles.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::expand_pair::ExpandPair;
use crate::ops::rotate_planes::{self, Planes};
use crate::ops::rotated_gate_gradient::rotated_gate_gradient;
use crate::ops::rotation::Kind;
use crate::ops::segment_outer::SegmentOuterPair;
use crate::ops::segments::{
    RowOf, expect_segments, gather, host_segments, products, row_share, spread_evenly, weight_sizes,
};
use crate::ops::shrink::{self, Shrink};
use crate::ops::shrink_choice::{Grouped, Kernel, TILE};
use crate::ops::subgroup_tile::SUBGROUP_TILE;
use crate::ops::{
    Choice, HostIo, LaunchTypes, Layout, Op, Real, Segments, Work, dims_f32, expect_count, shader,
};
use crate::tensor::{Tensor, TensorType};

/// Inputs: x `[rows, in]`, A `[experts, rank, in]`, V `[experts, rank / 2, in]`, experts, order, offsets. Outputs: the rotated latents
/// `[pairs, rank]`, the angles `[pairs, rank / 2]`.
#[derive(Clone, Copy, Debug)]
struct RotatedShrink {
    none: bool,
}

impl Graph {
    /// `[R(p) z, p]` with `z = A[e] x` and the angles `p = V[e] x`, for every pair of the segments: what [`Graph::shrink`] by A and by V and
    /// [`Rotation::Planes`](crate::ops::Rotation::Planes) would make of them, `[pairs, rank]` and `[pairs, rank / 2]`. `x` is `[rows, in]`,
    /// `a` `[experts, rank, in]`, `v` `[experts, rank / 2, in]`; both results are kept in f32. Pairs of no expert get zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn rotated_shrink(
        &mut self,
        x: Value,
        a: Value,
        v: Value,
        segments: Segments,
    ) -> Result<[Value; 2]> {
        let op = RotatedShrink {
            none: segments.none,
        };
        let Segments {
            experts,
            order,
            offsets,
            ..
        } = segments;
        let outputs = self.apply(op, &[x, a, v, experts, order, offsets])?;
        Ok([outputs[0], outputs[1]])
    }
}

impl RotatedShrink {
    /// Sizes of the product with A; the rank is its `out`.
    fn sizes(&self, inputs: &[TensorType]) -> Result<shrink::Sizes> {
        let name = self.name();
        let [rows, width] = dims_f32(name, "the operand", &inputs[0])?;
        let (experts, rank, input) = weight_sizes(name, &inputs[1], Layout::OutIn)?;
        let angles = weight_sizes(name, &inputs[2], Layout::OutIn)?;
        let pairs = expect_segments(name, &inputs[4], &inputs[5], experts, self.none)?;
        if inputs[3].elements() != pairs
            || width != input
            || rank % 2 == 1
            || angles != (experts, rank / 2, input)
        {
            return Err(Error::shape(
                name,
                format!(
                    "{} rows, {} and {} weights and {} experts do not fit",
                    inputs[0], inputs[1], inputs[2], inputs[3]
                ),
            ));
        }
        let share = row_share(name, "the operand", rows, pairs)?;
        Ok(shrink::Sizes {
            pairs,
            share,
            experts,
            out: rank,
            input,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..6)
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let shrink::Sizes {
            share,
            experts,
            out: rank,
            input,
            ..
        } = self.sizes(&types)?;
        let (x, order, offsets) = (io.floats(0)?, io.ints(4)?, io.ints(5)?);
        let segments = host_segments(order, offsets);
        let rows = |pairs: &[i32]| gather(x, input, pairs, RowOf::Share(share), |_| R::one());
        let product = |weight: &[R], out: usize| {
            products(
                &segments[..experts],
                weight,
                (out, input),
                Layout::OutIn,
                rows,
            )
        };
        let (latents, turns) = (
            product(io.floats(1)?, rank),
            product(io.floats(2)?, rank / 2),
        );
        let (u, angles) = (io.floats_out(0)?, io.floats_out(1)?);
        for (pairs, (z, p)) in segments.iter().zip(latents.iter().zip(&turns)) {
            let rows = z.chunks(rank).zip(p.chunks(rank / 2));
            for (&pair, (z, p)) in pairs.iter().zip(rows) {
                let pair = pair as usize;
                angles[pair * (rank / 2)..][..rank / 2].copy_from_slice(p);
                Planes.rotate(z, p, &mut u[pair * rank..][..rank]);
            }
        }
        for &pair in segments[experts..].iter().copied().flatten() {
            let pair = pair as usize;
            u[pair * rank..][..rank].fill(R::zero());
            angles[pair * (rank / 2)..][..rank / 2].fill(R::zero());
        }
        Ok(())
    }
}

impl Op for RotatedShrink {
    fn name(&self) -> &'static str {
        "rotated_shrink"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let shrink::Sizes {
            pairs,
            experts,
            out: rank,
            input,
            ..
        } = self.sizes(io.inputs)?;
        let used = experts.min(pairs) * rank * input;
        // A plane: sine, cosine, four products and two sums. The order says which expert a pair has.
        let planes = 8 * pairs * rank / 2;
        Ok(Work::moving(io)
            .reading(1, used)
            .reading(2, used / 2)
            .reading(3, 0)
            .with_flops(3 * pairs * rank * input + planes))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 6)?;
        let shrink::Sizes { pairs, out, .. } = self.sizes(inputs)?;
        Ok(vec![
            TensorType::f32([pairs, out]),
            TensorType::f32([pairs, out / 2]),
        ])
    }

    /// Angles need absolute accuracy, and may be many turns; their gradients are differences of products of the latents, which cancel.
    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let [x, a, v, experts, order, offsets] =
            [0, 1, 2, 3, 4, 5].map(|input| context.input(input));
        let (u, angles) = (context.output(0), context.output(1));
        let du = match context.gradient(0) {
            Some(du) => du,
            // Only the angles are used: nothing comes back through the rotation.
            None => {
                let zeros = Tensor::zeros(context.graph.ty(u)?);
                context.graph.constant(zeros)?
            }
        };
        let [dz, mut d_angles] = match context.graph.gated.get(&du).copied() {
            Some(gated) if gated.z == u => rotated_gate_gradient(context, gated, angles)?,
            _ => context.graph.planes_backward(u, angles, du)?,
        };
        if let Some(more) = context.gradient(1) {
            d_angles = context.graph.accumulate(d_angles, more)?;
        }
        if context.wants(0) {
            let rows = context.graph.ty(x)?.shape.rows();
            let pairs = context.graph.ty(dz)?.shape.rows();
            let by_row = context.graph.reshape(experts, [rows, pairs / rows])?;
            context.accumulate(0, |graph, base| {
                let op = ExpandPair {
                    accumulate: base.is_some(),
                    none: self.none,
                };
                let inputs = [dz, a, d_angles, v, by_row, order, offsets];
                graph.apply1(op, &inputs.into_iter().chain(base).collect::<Vec<_>>())
            })?;
        }
        if context.wants(1) || context.wants(2) {
            let op = SegmentOuterPair { none: self.none };
            let inputs = [dz, d_angles, x, order, offsets];
            let gradients = context.graph.apply(op, &inputs)?;
            for (input, gradient) in [(1, gradients[0]), (2, gradients[1])] {
                if context.wants(input) {
                    context.add(input, gradient)?;
                }
            }
        }
        Ok(())
    }

    fn choice(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Option<Choice>> {
        let sizes = self.sizes(io.inputs)?;
        // The three kernels of other sizes go by their own rules.
        let fused = Self::is_fused(&sizes);
        Ok(fused.then(|| self.grouped(&sizes).choice(capabilities)))
    }

    fn sample_integers(&self, inputs: &[TensorType]) -> Result<Option<Vec<Tensor>>> {
        let shrink::Sizes { experts, .. } = self.sizes(inputs)?;
        spread_evenly(experts, &inputs[3..])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = self.sizes(io.inputs)?;
        if Self::is_fused(&sizes) {
            return Ok(self.fused(&sizes, capabilities)?.into());
        }
        self.apart(&sizes, capabilities)
    }

    host_reference!();
}

impl RotatedShrink {
    fn is_fused(sizes: &shrink::Sizes) -> bool {
        sizes.out.is_multiple_of(4) && sizes.input.is_multiple_of(4)
    }

    fn grouped<'a>(&self, sizes: &'a shrink::Sizes) -> Grouped<'a> {
        Grouped {
            name: "rotated_shrink",
            sizes,
            segments: sizes.experts + usize::from(self.none),
        }
    }

    fn fused(&self, sizes: &shrink::Sizes, capabilities: &Capabilities) -> Result<Launch> {
        let &shrink::Sizes {
            pairs,
            share,
            experts,
            out: rank,
            input,
        } = sizes;
        let grouped = self.grouped(sizes);
        let segments = grouped.segments;
        let kernel = grouped.chosen(capabilities);
        let (launch, pairs_per_tile, coordinates_per_tile) = if kernel == Kernel::Subgroup {
            let shader = shader!(
                "rotated_shrink_subgroup",
                "subgroup_tile",
                "cos_sin",
                "rotate_two",
                "segment_tile"
            );
            (Launch::new(shader, "forward"), SUBGROUP_TILE, SUBGROUP_TILE)
        } else {
            let [lanes_pairs, lanes_out, lanes_k] = grouped.lanes(kernel);
            let shader = shader!("rotated_shrink", "cos_sin", "rotate_two", "segment_tile");
            let mut launch = if kernel == Kernel::Split {
                Launch::new(shader, "split").constant("LANES_K", lanes_k as f64)
            } else {
                Launch::new(shader, "forward")
            };
            launch = launch
                .constant("LANES_PAIRS", lanes_pairs as f64)
                .constant("LANES_OUT", lanes_out as f64);
            (launch, lanes_pairs * TILE, lanes_out * TILE)
        };
        // Every segment's last tile may be partly empty: at most one more tile a segment.
        let tiles = pairs.div_ceil(pairs_per_tile) + segments.min(pairs);
        let out_groups = rank.div_ceil(coordinates_per_tile);
        launch
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, Slot::Input(4))
            .read(5, Slot::Input(5))
            .write(6, Slot::Output(0))
            .write(7, Slot::Output(1))
            .param(experts)
            .param(segments)
            .param(rank)
            .param(input)
            .param(share)
            .param(out_groups)
            .folded(tiles * out_groups, capabilities)
    }

    /// The three kernels one after the other, for rows that are no multiples of four.
    fn apart(&self, sizes: &shrink::Sizes, capabilities: &Capabilities) -> Result<Launches> {
        let &shrink::Sizes {
            pairs,
            share,
            experts,
            out: rank,
            input,
        } = sizes;
        let mut launches = Launches::default();
        let z = launches.scratch_words(pairs * rank);
        let shrink = Shrink {
            layout: Layout::OutIn,
            none: self.none,
        };
        for (weight, out, result) in [(1, rank, z), (2, rank / 2, Slot::Output(1))] {
            let sizes = shrink::Sizes {
                pairs,
                share,
                experts,
                out,
                input,
            };
            let operands = [0, weight, 4, 5].map(Slot::Input);
            launches
                .launches
                .push(shrink.launch(&sizes, operands, result, capabilities)?);
        }
        launches.launches.push(rotate_planes::rotate(
            pairs * rank / 2,
            [z, Slot::Output(1)],
            Slot::Output(0),
            capabilities,
        )?);
        Ok(launches)
    }
}
