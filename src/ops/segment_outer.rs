//! The weight gradient of the grouped operations: for every expert the sum of outer products over its pairs,
//! `dW[e] = s sum_p g[p] left[p] right[p]ᵀ`, by segments, without atomics.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::segments::{RowOf, expect_segments, gather, host_segments, row_share};
use crate::ops::subgroup_tile::{SUBGROUP_TILE, subgroup_tiles};
use crate::ops::turns::expect_turns;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_dtype, shader,
};
use crate::tensor::{DType, TensorType};

/// Rows and columns that one invocation computes, as in `shaders/segment_outer.wgsl`.
const TILE: usize = 4;
/// Pairs that a turn of `shaders/segment_outer_subgroup.wgsl` takes.
const SUBGROUP_PAIRS: usize = 4;
const WORKGROUP: usize = 64;

/// Inputs: left `[rows, a]`, right `[rows, b]`, order, offsets, the gates if `gated`, the rows of right that the pairs read if
/// `right_mapped`. Output `[experts, a, b]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentOuter {
    pub(crate) scale: f32,
    pub(crate) gated: bool,
    pub(crate) none: bool,
    pub(crate) right_mapped: bool,
}

struct Sizes {
    pairs: usize,
    experts: usize,
    left: usize,
    right: usize,
    left_share: usize,
    /// Not used with `right_mapped`.
    right_share: usize,
    right_rows: usize,
}

impl SegmentOuter {
    /// The number of the input that maps pairs to rows of the right operand.
    fn map(&self) -> Option<usize> {
        self.right_mapped.then_some(4 + usize::from(self.gated))
    }

    fn count(&self) -> usize {
        4 + usize::from(self.gated) + usize::from(self.right_mapped)
    }

    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let [left_rows, left] = dims_f32(name, "the left operand", &inputs[0])?;
        let [right_rows, right] = dims_f32(name, "the right operand", &inputs[1])?;
        let segments = inputs[3].elements() - 1;
        let experts = segments.saturating_sub(usize::from(self.none));
        let pairs = expect_segments(name, &inputs[2], &inputs[3], experts, self.none)?;
        if self.gated && inputs[4].elements() != pairs {
            return Err(crate::Error::shape(
                name,
                format!("the gates are {} for {pairs} pairs", inputs[4]),
            ));
        }
        let right_share = match self.map() {
            Some(map) if inputs[map].elements() == pairs => {
                expect_dtype(name, "the rows", &inputs[map], DType::I32)?;
                1
            }
            Some(map) => {
                return Err(crate::Error::shape(
                    name,
                    format!("the rows are {} for {pairs} pairs", inputs[map]),
                ));
            }
            None => row_share(name, "the right operand", right_rows, pairs)?,
        };
        Ok(Sizes {
            pairs,
            experts,
            left,
            right,
            left_share: row_share(name, "the left operand", left_rows, pairs)?,
            right_share,
            right_rows,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..self.count())
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let sizes = self.sizes(&types)?;
        let (left, right, order, offsets) =
            (io.floats(0)?, io.floats(1)?, io.ints(2)?, io.ints(3)?);
        let gates = if self.gated {
            Some(io.floats(4)?)
        } else {
            None
        };
        let right_row = match self.map() {
            Some(map) => RowOf::Table(io.ints(map)?),
            None => RowOf::Share(sizes.right_share),
        };
        let scale = R::of(f64::from(self.scale));
        let segments = host_segments(order, offsets);
        outer_products(
            &sizes,
            &segments,
            (left, gates),
            (right, right_row),
            scale,
            io.floats_out(0)?,
        );
        Ok(())
    }
}

/// The sums on the host: left rows with their gates, right rows and how pairs find them.
fn outer_products<R: Real>(
    sizes: &Sizes,
    segments: &[&[i32]],
    (left, gates): (&[R], Option<&[R]>),
    (right, right_row): (&[R], RowOf<'_>),
    scale: R,
    out: &mut [R],
) {
    out.par_chunks_mut(sizes.left * sizes.right)
        .zip(segments.par_iter())
        .for_each(|(out, pairs)| {
            if pairs.is_empty() {
                return out.fill(R::zero());
            }
            let factor = |pair: usize| gates.map_or(scale, |gates| scale * gates[pair]);
            let left = gather(
                left,
                sizes.left,
                pairs,
                RowOf::Share(sizes.left_share),
                factor,
            );
            let right = gather(right, sizes.right, pairs, right_row, |_| R::one());
            let left = Matrix::new(&left, pairs.len(), sizes.left).transposed_if(true);
            gemm(
                out,
                left,
                Matrix::new(&right, pairs.len(), sizes.right),
                R::one(),
                false,
                false,
            );
        });
}

impl Op for SegmentOuter {
    fn name(&self) -> &'static str {
        "segment_outer"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            left,
            right,
            right_rows,
            ..
        } = self.sizes(io.inputs)?;
        let pairs = io.inputs[2].elements();
        let gate = usize::from(self.gated) * left.min(right);
        Ok(Work::moving(io)
            .reading(1, right_rows.min(pairs) * right)
            .with_flops(pairs * (2 * left * right + gate)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, self.count())?;
        let sizes = self.sizes(inputs)?;
        Ok(vec![TensorType::f32([
            sizes.experts,
            sizes.left,
            sizes.right,
        ])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = self.sizes(io.inputs)?;
        // Without gates or a map their bindings are not read: any buffer will do.
        let gates = Slot::Input(if self.gated { 4 } else { 0 });
        let rows = Slot::Input(self.map().unwrap_or(2));
        let operands = [
            Slot::Input(0),
            Slot::Input(1),
            Slot::Input(2),
            Slot::Input(3),
            gates,
            rows,
        ];
        Ok(self
            .launch(&sizes, operands, Slot::Output(0), capabilities)?
            .into())
    }

    host_reference!();
}

impl SegmentOuter {
    /// The kernel of the operands left, right, order, offsets, gates and rows.
    fn launch(
        &self,
        sizes: &Sizes,
        [left_rows, right_rows_at, order, offsets, gates, rows]: [Slot; 6],
        gradient: Slot,
        capabilities: &Capabilities,
    ) -> Result<Launch> {
        let &Sizes {
            pairs,
            experts,
            left,
            right,
            left_share,
            right_share,
            right_rows,
        } = sizes;
        if subgroup_tiles(capabilities) && left.is_multiple_of(4) && right.is_multiple_of(4) {
            expect_turns(self.name(), [pairs, SUBGROUP_PAIRS], "pairs", capabilities)?;
            let left_groups = left.div_ceil(SUBGROUP_TILE);
            let right_groups = right.div_ceil(SUBGROUP_TILE);
            return Launch::new(shader!("segment_outer_subgroup", "subgroup_tile"), "one")
                .constant("GATED", self.gated)
                .constant("MAPPED", self.right_mapped)
                .read(1, left_rows)
                .read(2, right_rows_at)
                .read(3, order)
                .read(4, offsets)
                .read(5, gates)
                .write(6, gradient)
                .read(7, rows)
                .param(experts)
                .param(left)
                .param(right)
                .param(left_share)
                .param(right_share)
                .param(right_rows)
                .param(self.scale)
                .param(0_usize)
                .param(left_groups)
                .param(0_usize)
                .param(right_groups)
                .folded(experts * left_groups * right_groups, capabilities);
        }
        expect_turns(self.name(), [pairs, 1], "pairs", capabilities)?;
        let lanes_right = right.div_ceil(TILE).next_power_of_two().min(16);
        let lanes_left = (WORKGROUP / lanes_right).min(left.div_ceil(TILE).next_power_of_two());
        let (left_groups, right_groups) = (
            left.div_ceil(lanes_left * TILE),
            right.div_ceil(lanes_right * TILE),
        );
        Launch::new(shader!("segment_outer"), "forward")
            .constant("LANES_LEFT", lanes_left as f64)
            .constant("LANES_RIGHT", lanes_right as f64)
            .constant("ALIGNED", left % 4 == 0 && right % 4 == 0)
            .constant("GATED", self.gated)
            .constant("MAPPED", self.right_mapped)
            .read(1, left_rows)
            .read(2, right_rows_at)
            .read(3, order)
            .read(4, offsets)
            .read(5, gates)
            .write(6, gradient)
            .read(7, rows)
            .param(experts)
            .param(left)
            .param(right)
            .param(left_share)
            .param(right_share)
            .param(right_rows)
            .param(self.scale)
            .param(left_groups)
            .param(right_groups)
            .folded(experts * left_groups * right_groups, capabilities)
    }
}

/// Two weight gradients whose pairs read the same right rows. Inputs: both left operands `[pairs, a]` and `[pairs, a2]`, right `[rows, b]`,
/// order, offsets. Outputs `[experts, a, b]` and `[experts, a2, b]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentOuterPair {
    pub(crate) none: bool,
}

impl SegmentOuterPair {
    fn one(&self) -> SegmentOuter {
        SegmentOuter {
            scale: 1.0,
            gated: false,
            none: self.none,
            right_mapped: false,
        }
    }

    /// What each of the two would be by itself.
    fn sizes(&self, inputs: &[TensorType]) -> Result<[Sizes; 2]> {
        let of = |left: usize| {
            let operands = [left, 2, 3, 4].map(|input| inputs[input].clone());
            self.one().sizes(&operands)
        };
        Ok([of(0)?, of(1)?])
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..5)
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let segments = host_segments(io.ints(3)?, io.ints(4)?);
        let right = io.floats(2)?;
        for (which, sizes) in self.sizes(&types)?.iter().enumerate() {
            let left = (io.floats(which)?, None);
            let right = (right, RowOf::Share(sizes.right_share));
            outer_products(
                sizes,
                &segments,
                left,
                right,
                R::one(),
                io.floats_out(which)?,
            );
        }
        Ok(())
    }
}

impl Op for SegmentOuterPair {
    fn name(&self) -> &'static str {
        "segment_outer_pair"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [first, second] = self.sizes(io.inputs)?;
        let pairs = io.inputs[3].elements();
        Ok(Work::moving(io)
            .reading(2, first.right_rows.min(pairs) * first.right)
            .with_flops(2 * pairs * (first.left + second.left) * first.right))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 5)?;
        let sizes = self.sizes(inputs)?;
        Ok(sizes
            .iter()
            .map(|one| TensorType::f32([one.experts, one.left, one.right]))
            .collect())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [first, second] = self.sizes(io.inputs)?;
        let fours = [first.left, second.left, first.right]
            .iter()
            .all(|width| width.is_multiple_of(4));
        let [right, order, offsets] = [2, 3, 4].map(Slot::Input);
        if !(subgroup_tiles(capabilities) && fours) {
            let launches = [&first, &second]
                .into_iter()
                .enumerate()
                .map(|(which, sizes)| {
                    let left = Slot::Input(which);
                    // Neither gates nor a map are read: any buffer will do.
                    let operands = [left, right, order, offsets, left, order];
                    self.one()
                        .launch(sizes, operands, Slot::Output(which), capabilities)
                });
            return Ok(launches.collect::<Result<Vec<_>>>()?.into());
        }
        expect_turns(
            self.name(),
            [first.pairs, SUBGROUP_PAIRS],
            "pairs",
            capabilities,
        )?;
        let groups = |width: usize| width.div_ceil(SUBGROUP_TILE);
        let (left_groups, left2_groups) = (groups(first.left), groups(second.left));
        let right_groups = groups(first.right);
        let launch = Launch::new(shader!("segment_outer_subgroup", "subgroup_tile"), "two")
            .read(1, Slot::Input(0))
            .read(2, right)
            .read(3, order)
            .read(4, offsets)
            .write(6, Slot::Output(0))
            .read(8, Slot::Input(1))
            .write(9, Slot::Output(1))
            .param(first.experts)
            .param(first.left)
            .param(first.right)
            .param(first.left_share)
            .param(first.right_share)
            .param(first.right_rows)
            .param(1.0_f32)
            .param(second.left)
            .param(left_groups)
            .param(left2_groups)
            .param(right_groups)
            .folded(
                first.experts * (left_groups + left2_groups) * right_groups,
                capabilities,
            )?;
        Ok(launch.into())
    }

    host_reference!();
}
