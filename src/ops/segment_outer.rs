//! The weight gradient of the grouped operations: for every expert the sum of outer products over its pairs,
//! `dW[e] = s sum_p g[p] left[p] right[p]ᵀ`, by segments, without atomics.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::segments::{expect_segments, gather, host_segments, row_share};
use crate::ops::{HostIo, LaunchTypes, Op, Real, dims_f32, expect_count, shader};
use crate::tensor::TensorType;

/// Rows and columns that one invocation computes, as in `shaders/segment_outer.wgsl`.
const TILE: usize = 4;
const WORKGROUP: usize = 64;

/// Inputs: left `[rows, a]`, right `[rows, b]`, order, offsets, the gates if `gated`. Output `[experts, a, b]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentOuter {
    pub(crate) scale: f32,
    pub(crate) gated: bool,
}

struct Sizes {
    experts: usize,
    left: usize,
    right: usize,
    left_share: usize,
    right_share: usize,
}

impl SegmentOuter {
    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let [left_rows, left] = dims_f32(name, "the left operand", &inputs[0])?;
        let [right_rows, right] = dims_f32(name, "the right operand", &inputs[1])?;
        let experts = inputs[3].elements() - 1;
        let pairs = expect_segments(name, &inputs[2], &inputs[3], experts)?;
        if self.gated && inputs[4].elements() != pairs {
            return Err(crate::Error::shape(
                name,
                format!("the gates are {} for {pairs} pairs", inputs[4]),
            ));
        }
        Ok(Sizes {
            experts,
            left,
            right,
            left_share: row_share(name, "the left operand", left_rows, pairs)?,
            right_share: row_share(name, "the right operand", right_rows, pairs)?,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..4 + usize::from(self.gated))
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
                let left = gather(left, sizes.left, pairs, sizes.left_share, factor);
                let right = gather(right, sizes.right, pairs, sizes.right_share, |_| R::one());
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

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4 + usize::from(self.gated))?;
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
        } = self.sizes(io.inputs)?;
        let lanes_right = right.div_ceil(TILE).next_power_of_two().min(16);
        let lanes_left = (WORKGROUP / lanes_right).min(left.div_ceil(TILE).next_power_of_two());
        let (left_groups, right_groups) = (
            left.div_ceil(lanes_left * TILE),
            right.div_ceil(lanes_right * TILE),
        );
        // Without gates the binding is not read: any buffer will do.
        let gates = if self.gated {
            Slot::Input(4)
        } else {
            Slot::Input(0)
        };
        let launch = Launch::new(shader!("segment_outer"), "forward")
            .constant("LANES_LEFT", lanes_left as f64)
            .constant("LANES_RIGHT", lanes_right as f64)
            .constant("ALIGNED", left % 4 == 0 && right % 4 == 0)
            .constant("GATED", self.gated)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, Slot::Input(3))
            .read(5, gates)
            .write(6, Slot::Output(0))
            .param(experts)
            .param(left)
            .param(right)
            .param(left_share)
            .param(right_share)
            .param(self.scale)
            .param(left_groups)
            .param(right_groups)
            .folded(experts * left_groups * right_groups, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
