//! The weight gradient of the grouped operations: for every expert the sum of outer products over its pairs,
//! `dW[e] = s sum_p g[p] left[p] right[p]ᵀ`, by segments, without atomics.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::segments::{RowOf, expect_segments, gather, host_segments, row_share};
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_dtype, shader,
};
use crate::tensor::{DType, TensorType};

/// Rows and columns that one invocation computes, as in `shaders/segment_outer.wgsl`.
const TILE: usize = 4;
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
        let out = io.floats_out(0)?;
        let segments = host_segments(order, offsets);
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
        Ok(())
    }
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
        let Sizes {
            experts,
            left,
            right,
            left_share,
            right_share,
            right_rows,
        } = self.sizes(io.inputs)?;
        let lanes_right = right.div_ceil(TILE).next_power_of_two().min(16);
        let lanes_left = (WORKGROUP / lanes_right).min(left.div_ceil(TILE).next_power_of_two());
        let (left_groups, right_groups) = (
            left.div_ceil(lanes_left * TILE),
            right.div_ceil(lanes_right * TILE),
        );
        // Without gates or a map their bindings are not read: any buffer will do.
        let gates = Slot::Input(if self.gated { 4 } else { 0 });
        let rows = Slot::Input(self.map().unwrap_or(2));
        let launch = Launch::new(shader!("segment_outer"), "forward")
            .constant("LANES_LEFT", lanes_left as f64)
            .constant("LANES_RIGHT", lanes_right as f64)
            .constant("ALIGNED", left % 4 == 0 && right % 4 == 0)
            .constant("GATED", self.gated)
            .constant("MAPPED", self.right_mapped)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, Slot::Input(3))
            .read(5, gates)
            .write(6, Slot::Output(0))
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
            .folded(experts * left_groups * right_groups, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
