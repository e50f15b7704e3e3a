//! Softmax over the rows of a matrix: the gates of a dense mixture, in which every expert has a part.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::spread::{ROW_LANES, row_by_invocation};
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

/// The kernel that takes a row by a workgroup, or by an invocation where that is better: each with its entry point and the numbers of its bindings,
/// in the order of the inputs and then the output.
fn launch(
    [by_workgroup, by_invocation]: [(&'static str, &[u32]); 2],
    [rows, columns]: [usize; 2],
    capabilities: &Capabilities,
) -> Result<Launches> {
    let alone = row_by_invocation([rows, columns], capabilities);
    let ((entry, bindings), workgroup, groups) = if alone {
        (by_invocation, ROW_LANES as u32, rows.div_ceil(ROW_LANES))
    } else {
        (by_workgroup, row_workgroup(columns, capabilities), rows)
    };
    let mut launch = Launch::new(shader!("softmax", "reduce", "soft_max"), entry)
        .constant("WORKGROUP", workgroup)
        .param(rows)
        .param(columns);
    if let Some((&output, inputs)) = bindings.split_last() {
        for (input, &number) in inputs.iter().enumerate() {
            launch = launch.read(number, Slot::Input(input));
        }
        launch = launch.write(output, Slot::Output(0));
    }
    Ok(launch.folded(groups, capabilities)?.into())
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
        let sizes = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let kernels = [("forward", &[1, 4][..]), ("rows_forward", &[5, 8])];
        launch(kernels, sizes, capabilities)
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
        let sizes = dims_f32(self.name(), "the probabilities", &io.inputs[0])?;
        let kernels = [("backward", &[2, 3, 4][..]), ("rows_backward", &[6, 7, 8])];
        launch(kernels, sizes, capabilities)
    }

    host_reference!();
}
