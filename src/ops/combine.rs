//! Combine: the rows of a token's pairs, weighted by their gates, summed into the rows that the token has: one for each group of
//! experts that is active for it.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::{
    ActiveGroups, HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32,
    expect_i32, row_workgroup, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Operands u `[pairs, width]`, gates `[tokens, slots]`, rows `[tokens, slots]`.
#[derive(Clone, Copy, Debug)]
struct Combine {
    rows_per_token: usize,
}

/// Operands u, gates, rows, dy. Results du, d_gates.
#[derive(Clone, Copy, Debug)]
struct CombineBackward {
    rows_per_token: usize,
}

impl Graph {
    /// `v[row] = sum over the pairs p of that row of gates[p] u[p]`: `u` is `[pairs, width]`, `gates` `[tokens, top_k]`, the result
    /// `[tokens * groups.per_token(), width]`: for every token a row for each of its active groups, zeros where it has fewer.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn combine(&mut self, u: Value, gates: Value, groups: &ActiveGroups) -> Result<Value> {
        let rows_per_token = groups.per_token;
        self.apply1(Combine { rows_per_token }, &[u, gates, groups.rows])
    }
}

/// What a sum over slots reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CombineOperands {
    pub(crate) u: Slot,
    pub(crate) gates: Option<Slot>,
    pub(crate) rows: Option<Slot>,
    /// A buffer of integers that is there in any case: bound, but not read, where there are no rows.
    pub(crate) unread: Slot,
    pub(crate) y: Slot,
}

/// Sizes of a sum over slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CombineSizes {
    pub(crate) tokens: usize,
    pub(crate) rows_per_token: usize,
    pub(crate) slots: usize,
    pub(crate) width: usize,
}

impl CombineSizes {
    fn read(op: &'static str, rows_per_token: usize, inputs: &[TensorType]) -> Result<Self> {
        let [pairs, width] = dims_f32(op, "the rows of the pairs", &inputs[0])?;
        let [tokens, slots] = dims_f32(op, "the gates", &inputs[1])?;
        expect_i32(op, "the row numbers", &inputs[2], &[tokens, slots])?;
        if pairs != tokens * slots {
            return Err(Error::shape(
                op,
                format!("{} rows of pairs, gates {}", pairs, inputs[1]),
            ));
        }
        Ok(Self {
            tokens,
            rows_per_token,
            slots,
            width,
        })
    }

    fn rows(&self) -> usize {
        self.tokens * self.rows_per_token
    }

    fn params(&self, launch: Launch, scale: f32) -> Launch {
        launch
            .param(self.rows())
            .param(self.rows_per_token)
            .param(self.slots)
            .param(self.width)
            .param(scale)
    }

    /// The sum of u, with gates and row numbers where there are any, written to or added into y: here, and in the wide form of
    /// expand.
    pub(crate) fn launch(
        &self,
        operands: CombineOperands,
        (scale, accumulate): (f32, bool),
        capabilities: &Capabilities,
    ) -> Result<Launch> {
        let CombineOperands {
            u,
            gates,
            rows,
            unread,
            y,
        } = operands;
        let fours = self.width.is_multiple_of(4);
        let (entry, u_binding, y_binding, each) = if fours {
            ("forward_four", 8, 9, 4)
        } else {
            ("forward", 1, 4, 1)
        };
        let launch = Launch::new(shader!("combine", "reduce"), entry)
            .constant("GATED", gates.is_some())
            .constant("MAPPED", rows.is_some())
            .constant("ACCUMULATE", accumulate)
            .read(u_binding, u)
            .read(2, gates.unwrap_or(u))
            .read(3, rows.unwrap_or(unread))
            .write(y_binding, y);
        let invocations = self.rows() * self.width / each;
        self.params(launch, scale)
            .folded(invocations.div_ceil(WORKGROUP), capabilities)
    }
}

impl Combine {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (u, gates, rows) = (io.floats(0)?, io.floats(1)?, io.ints(2)?);
        let (width, slots) = (
            io.input_type(0)?.shape.last(),
            io.input_type(1)?.shape.last(),
        );
        let per_token = self.rows_per_token;
        io.floats_out(0)?
            .par_chunks_mut(width)
            .enumerate()
            .for_each(|(row, y)| {
                y.fill(R::zero());
                let token = row / per_token;
                for pair in token * slots..(token + 1) * slots {
                    if rows[pair] as usize != row {
                        continue;
                    }
                    for (y, &u) in y.iter_mut().zip(&u[pair * width..]) {
                        *y += gates[pair] * u;
                    }
                }
            });
        Ok(())
    }
}

impl Op for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(2 * io.inputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let sizes = CombineSizes::read(self.name(), self.rows_per_token, inputs)?;
        Ok(vec![TensorType::f32([sizes.rows(), sizes.width])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let op = CombineBackward {
            rows_per_token: self.rows_per_token,
        };
        let [u, gates, rows] = [0, 1, 2].map(|input| context.input(input));
        let outputs = context.graph.apply(op, &[u, gates, rows, dy])?;
        for (input, gradient) in outputs.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = CombineSizes::read(self.name(), self.rows_per_token, io.inputs)?;
        let operands = CombineOperands {
            u: Slot::Input(0),
            gates: Some(Slot::Input(1)),
            rows: Some(Slot::Input(2)),
            unread: Slot::Input(2),
            y: Slot::Output(0),
        };
        let launch = sizes.launch(operands, (1.0, false), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl CombineBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (u, gates, rows, dy) = (io.floats(0)?, io.floats(1)?, io.ints(2)?, io.floats(3)?);
        let width = io.input_type(0)?.shape.last();
        let (du, d_gates) = (io.floats_out(0)?, io.floats_out(1)?);
        for (pair, (du, d_gate)) in du.chunks_mut(width).zip(d_gates).enumerate() {
            let start = rows[pair] as usize * width;
            let Some(dy) = dy.get(start..start + width) else {
                du.fill(R::zero());
                *d_gate = R::zero();
                continue;
            };
            let u = &u[pair * width..][..width];
            *d_gate = dy.iter().zip(u).map(|(&dy, &u)| dy * u).sum();
            for (du, &dy) in du.iter_mut().zip(dy) {
                *du = gates[pair] * dy;
            }
        }
        Ok(())
    }
}

impl Op for CombineBackward {
    fn name(&self) -> &'static str {
        "combine_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(3 * io.inputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4)?;
        let sizes = CombineSizes::read(self.name(), self.rows_per_token, inputs)?;
        expect_f32(self.name(), "dy", &inputs[3], &[sizes.rows(), sizes.width])?;
        Ok(inputs[..2].to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = CombineSizes::read(self.name(), self.rows_per_token, io.inputs)?;
        let launch = Launch::new(shader!("combine", "reduce"), "backward")
            .constant("WORKGROUP", row_workgroup(sizes.width, capabilities))
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(5, Slot::Input(3))
            .write(6, Slot::Output(0))
            .write(7, Slot::Output(1));
        let launch = sizes
            .params(launch, 1.0)
            .folded(sizes.tokens * sizes.slots, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
