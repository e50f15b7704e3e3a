//! What a router does, in a few numbers: how many pairs each expert gets and loses, and how undecided the router is.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::host_sum::total_of;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Segments, TOTAL_WORKGROUP, Work, dims_f32, expect_count,
    expect_i32, row_workgroup, shader,
};
use crate::tensor::TensorType;

/// What a router did in a run: values to be marked as outputs and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterMetrics {
    /// How many (token, slot) pairs chose each expert, before any was dropped: `i32 [experts]`.
    pub counts: Value,
    /// How many of them were dropped: `i32 [experts]`.
    pub dropped: Value,
    /// The mean over the tokens of the entropy of the softmax over all experts, in nats: a scalar, 0 for a router that is certain,
    /// ln(experts) for one that knows nothing.
    pub entropy: Value,
}

/// Operands logits, offsets before dropping. Results counts, dropped, entropy.
#[derive(Clone, Copy, Debug)]
struct Metrics {
    capacity: usize,
}

impl Graph {
    /// Counts, drops and entropy of a router with these `logits` (`[tokens, experts]`) and choices before dropping; `capacity` is what
    /// [`Graph::limit_capacity`] was given, if it was. The counts come from the segments: no pair is looked at again.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the segments are not of as many experts as there are logits, or have dropped pairs.
    pub fn router_metrics(
        &mut self,
        logits: Value,
        chosen: Segments,
        capacity: Option<usize>,
    ) -> Result<RouterMetrics> {
        let op = Metrics {
            capacity: capacity.unwrap_or(usize::MAX).min(i32::MAX as usize),
        };
        let outputs = self.apply(op, &[logits, chosen.offsets])?;
        Ok(RouterMetrics {
            counts: outputs[0],
            dropped: outputs[1],
            entropy: outputs[2],
        })
    }
}

impl Metrics {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, offsets) = (io.floats(0)?, io.ints(1)?);
        let experts = io.input_type(0)?.shape.last();
        let (counts, dropped) = (io.ints_out(0)?, io.ints_out(1)?);
        let both = counts.iter_mut().zip(dropped);
        for (ends, (count, dropped)) in offsets.windows(2).zip(both) {
            *count = ends[1] - ends[0];
            *dropped = (*count - self.capacity as i32).max(0);
        }
        // Collected before they are added up, so that the order of the additions does not depend on the threads.
        let entropies: Vec<R> = logits
            .par_chunks_exact(experts)
            .map(|logits| {
                let (max, sum) = max_and_sum(logits);
                let mixed: R = logits
                    .iter()
                    // An expert that is masked out has no part in the entropy: not 0 times infinity.
                    .map(|&logit| (logit - max).exp() * (logit - max).max(R::of(-200.0)))
                    .sum();
                sum.ln() - mixed / sum
            })
            .collect();
        let tokens = R::of(entropies.len() as f64);
        io.floats_out(2)?[0] = total_of(&entropies, |entropy| entropy) / tokens;
        Ok(())
    }
}

impl Op for Metrics {
    fn name(&self) -> &'static str {
        "router_metrics"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the maximum, exp, its sum, its product with the difference and their sum; each row's logarithm, division, difference
        // and sum.
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(tokens * (5 * experts + 4)))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [_, experts] = dims_f32(self.name(), "the logits", &inputs[0])?;
        expect_i32(self.name(), "the offsets", &inputs[1], &[experts + 1])?;
        let counts = TensorType::i32([experts]);
        Ok(vec![counts.clone(), counts, TensorType::f32([])])
    }

    fn differentiable(&self, _input: usize) -> bool {
        false
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = |entry, workgroup: u32| {
            Launch::new(shader!("router_metrics", "reduce", "soft_max"), entry)
                .constant("WORKGROUP", workgroup)
                .param(tokens)
                .param(experts)
                .param(self.capacity)
        };
        let mut launches = Launches::default();
        let entropies = launches.scratch_words(tokens);
        let count = launch("count", 64)
            .read(2, Slot::Input(1))
            .write(3, Slot::Output(0))
            .write(4, Slot::Output(1))
            .folded(experts.div_ceil(64), capabilities)?;
        let row = launch("row", row_workgroup(experts, capabilities))
            .read(1, Slot::Input(0))
            .write(5, entropies)
            .folded(tokens, capabilities)?;
        let total = launch("total", TOTAL_WORKGROUP)
            .write(5, entropies)
            .write(6, Slot::Output(2))
            .folded(1, capabilities)?;
        launches.launches.extend([count, row, total]);
        Ok(launches)
    }

    host_reference!();
}
