//! The z loss, which keeps the logits of a router small.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::host_sum::total_of;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, TOTAL_WORKGROUP, Work, dims_f32, expect_count, expect_f32,
    row_workgroup, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Results: the loss, and the log-sum-exp of every token.
#[derive(Clone, Copy, Debug)]
struct ZLoss;

/// Operands logits, log-sum-exp, dloss.
#[derive(Clone, Copy, Debug)]
struct ZLossBackward;

impl Graph {
    /// The mean over the tokens of `logsumexp(logits)^2`, a scalar: `logits` is `[tokens, experts]`
    /// (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation 5).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `logits` is anything else.
    pub fn z_loss(&mut self, logits: Value) -> Result<Value> {
        self.apply1(ZLoss, &[logits])
    }
}

fn launch(entry: &'static str, [tokens, experts]: [usize; 2]) -> Launch {
    Launch::new(shader!("z_loss", "reduce", "soft_max"), entry)
        .param(tokens)
        .param(experts)
        .param(1.0 / tokens as f32)
}

impl ZLoss {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let logits = io.floats(0)?;
        let (loss, lse) = (io.floats_out(0)?, io.floats_out(1)?);
        let experts = logits.len() / lse.len();
        lse.par_iter_mut()
            .zip(logits.par_chunks_exact(experts))
            .for_each(|(lse, row)| {
                let (max, sum) = max_and_sum(row);
                *lse = max + sum.ln();
            });
        loss[0] = total_of(lse, |lse| lse * lse) / R::of(lse.len() as f64);
        Ok(())
    }
}

impl Op for ZLoss {
    fn name(&self) -> &'static str {
        "z_loss"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the maximum, exp, its sum; each row's logarithm, square and sum.
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(tokens * (3 * experts + 4)))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        let [tokens, _] = dims_f32(self.name(), "the logits", &inputs[0])?;
        Ok(vec![TensorType::f32([]), TensorType::f32([tokens])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dloss) = context.gradient(0) else {
            return Ok(());
        };
        let (logits, lse) = (context.input(0), context.output(1));
        let dlogits = context.graph.apply1(ZLossBackward, &[logits, lse, dloss])?;
        context.add(0, dlogits)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let row = launch("row", [tokens, experts])
            .constant("WORKGROUP", row_workgroup(experts, capabilities))
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(1))
            .folded(tokens, capabilities)?;
        let total = launch("total", [tokens, experts])
            .constant("WORKGROUP", TOTAL_WORKGROUP)
            .read(3, Slot::Output(1))
            .write(5, Slot::Output(0))
            .folded(1, capabilities)?;
        Ok(vec![row, total].into())
    }

    host_reference!();
}

impl ZLossBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, lse, dloss) = (io.floats(0)?, io.floats(1)?, io.floats(2)?[0]);
        let experts = logits.len() / lse.len();
        let scale = dloss * R::of(2.0 / lse.len() as f64);
        let dlogits = io.floats_out(0)?;
        let rows = dlogits
            .par_chunks_exact_mut(experts)
            .zip(logits.par_chunks_exact(experts))
            .zip(lse);
        rows.for_each(|((dlogits, logits), &lse)| {
            for (dlogit, &logit) in dlogits.iter_mut().zip(logits) {
                *dlogit = scale * lse * (logit - lse).exp();
            }
        });
        Ok(())
    }
}

impl Op for ZLossBackward {
    fn name(&self) -> &'static str {
        "z_loss_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the log-sum-exp, exp, the factor.
        Ok(Work::moving(io).with_flops(3 * io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [tokens, _] = dims_f32(self.name(), "the logits", &inputs[0])?;
        expect_f32(self.name(), "the log-sum-exp", &inputs[1], &[tokens])?;
        expect_f32(self.name(), "dloss", &inputs[2], &[])?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = launch("backward", [tokens, experts])
            .read(1, Slot::Input(0))
            .read(3, Slot::Input(1))
            .read(4, Slot::Input(2))
            .write(5, Slot::Output(0))
            .folded((tokens * experts).div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
