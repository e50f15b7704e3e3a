//! Softmax over the rows of a matrix: the gates of a dense mixture, in which every expert has a part.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32, row_workgroup, shader,
};
use crate::tensor::TensorType;

#[derive(Clone, Copy, Debug)]
struct Softmax;

/// Operands the probabilities and their gradient.
#[derive(Clone, Copy, Debug)]
struct SoftmaxBackward;

impl Graph {
    /// The softmax of each row of `logits` (`[rows, columns]`): positive numbers that sum to 1.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `logits` is not a matrix of floats.
    pub fn softmax(&mut self, logits: Value) -> Result<Value> {
        self.apply1(Softmax, &[logits])
    }
}

fn launch(entry: &'static str, [rows, columns]: [usize; 2]) -> Launch {
    Launch::new(shader!("softmax", "reduce", "soft_max"), entry)
        .constant("WORKGROUP", row_workgroup(columns))
        .param(rows)
        .param(columns)
}

/// The gradient of a row of logits from that of their probabilities.
pub(crate) fn row_gradient<'a, R: Real>(p: &'a [R], dp: &'a [R]) -> impl Iterator<Item = R> + 'a {
    let largest = (0..p.len()).fold(0, |best, e| if p[e] > p[best] { e } else { best });
    // Less the gradient of the largest probability, so that the mean keeps its digits when this one is nearly 1.
    let reference = dp[largest];
    let mean: R = p.iter().zip(dp).map(|(&p, &dp)| p * (dp - reference)).sum();
    p.iter()
        .zip(dp)
        .map(move |(&p, &dp)| p * (dp - reference - mean))
}

impl Softmax {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let columns = io.input_type(0)?.shape.last();
        let (logits, p) = (io.floats(0)?, io.floats_out(0)?);
        let rows = p.par_chunks_mut(columns).zip(logits.par_chunks(columns));
        rows.for_each(|(p, logits)| {
            let (max, sum) = max_and_sum(logits);
            for (p, &logit) in p.iter_mut().zip(logits) {
                *p = (logit - max).exp() / sum;
            }
        });
        Ok(())
    }
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the maximum, exp, its sum, the division.
        Ok(Work::moving(io).with_flops(4 * io.outputs[0].elements()))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        dims_f32::<2>(self.name(), "the logits", &inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dp) = context.gradient(0) else {
            return Ok(());
        };
        let p = context.output(0);
        let d_logits = context.graph.apply1(SoftmaxBackward, &[p, dp])?;
        context.add(0, d_logits)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, columns] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = launch("forward", [rows, columns])
            .read(1, Slot::Input(0))
            .write(4, Slot::Output(0))
            .folded(rows, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl SoftmaxBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let columns = io.input_type(0)?.shape.last();
        let (p, dp) = (io.floats(0)?, io.floats(1)?);
        let rows = io
            .floats_out(0)?
            .par_chunks_mut(columns)
            .zip(p.par_chunks(columns))
            .zip(dp.par_chunks(columns));
        rows.for_each(|((d_logits, p), dp)| {
            for (d_logit, gradient) in d_logits.iter_mut().zip(row_gradient(p, dp)) {
                *d_logit = gradient;
            }
        });
        Ok(())
    }
}

impl Op for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The sum of p dp, a difference, a product.
        Ok(Work::moving(io).with_flops(4 * io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        dims_f32::<2>(self.name(), "the probabilities", &inputs[0])?;
        expect_f32(self.name(), "dp", &inputs[1], inputs[0].dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, columns] = dims_f32(self.name(), "the probabilities", &io.inputs[0])?;
        let launch = launch("backward", [rows, columns])
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(1))
            .write(4, Slot::Output(0))
            .folded(rows, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
