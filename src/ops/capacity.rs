//! The capacity of experts: pairs beyond it are dropped (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, section 2.2).

use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph};
use crate::host_reference;
use crate::ops::segments::{expect_segments, host_segments};
use crate::ops::turns::expect_turns;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Routed, Segments, expect_count, expect_f32, expect_i32, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 256;
/// Passes over an expert's pairs by gate: one for each of 31 bits of the smallest gate that stays and 32 of a number of places, and two more.
const PASSES: usize = 65;

/// Which pairs of a full expert are dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropPolicy {
    /// The later ones, in the order of the tokens.
    #[default]
    Position,
    /// Those with the smallest gates; of equal ones the later.
    Gate,
}

/// Operands experts `[tokens, top_k]`, gates, order, offsets. Results: experts and gates after dropping.
#[derive(Clone, Copy, Debug)]
struct LimitCapacity {
    experts: usize,
    capacity: usize,
    policy: DropPolicy,
}

/// Operands experts after dropping, upstream.
#[derive(Clone, Copy, Debug)]
struct LimitCapacityBackward {
    experts: usize,
}

impl Graph {
    /// Leaves each of `experts` experts at most `capacity` of its pairs. A dropped pair belongs to no expert and has the gate 0; the
    /// gates that stay are as they were, and no gradient flows through one that is dropped.
    ///
    /// # Errors
    /// [`Error::Setting`] if the capacity is 0, [`Error::Shape`] if `routed` is not of so many experts, or has dropped pairs before.
    pub fn limit_capacity(
        &mut self,
        routed: Routed,
        experts: usize,
        capacity: usize,
        policy: DropPolicy,
    ) -> Result<Routed> {
        let Segments {
            experts: chosen,
            order,
            offsets,
            ..
        } = routed.segments;
        let op = LimitCapacity {
            experts,
            capacity,
            policy,
        };
        let outputs = self.apply(op, &[chosen, routed.gates, order, offsets])?;
        Ok(Routed {
            gates: outputs[1],
            segments: self.segments_with_none(outputs[0], experts)?,
        })
    }
}

/// A launch with the bindings still to be named.
fn launch(entry: &'static str, pairs: usize, experts: usize, capacity: usize) -> Launch {
    Launch::new(shader!("capacity"), entry)
        .constant("WORKGROUP", WORKGROUP as f64)
        .param(pairs)
        .param(experts)
        .param(capacity)
}

impl LimitCapacity {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (chosen, gates) = (io.ints(0)?, io.floats(1)?);
        let (order, offsets) = (io.ints(2)?, io.ints(3)?);
        let (kept, kept_gates) = (io.ints_out(0)?, io.floats_out(1)?);
        kept.copy_from_slice(chosen);
        kept_gates.copy_from_slice(gates);
        // A NaN counts as 0.
        let key = |pair: i32| gates[pair as usize].max(R::zero()).f64();
        for pairs in host_segments(order, offsets) {
            let mut pairs = pairs.to_vec();
            if self.policy == DropPolicy::Gate {
                // Stable: equal gates stay in the order of the tokens.
                pairs.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
            }
            for &pair in pairs.iter().skip(self.capacity) {
                kept[pair as usize] = self.experts as i32;
                kept_gates[pair as usize] = R::zero();
            }
        }
        Ok(())
    }
}

impl Op for LimitCapacity {
    fn name(&self) -> &'static str {
        "limit_capacity"
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4)?;
        if self.capacity == 0 {
            return Err(Error::setting(
                "capacity",
                self.capacity,
                "an expert takes at least one pair",
            ));
        }
        let pairs = expect_segments(self.name(), &inputs[2], &inputs[3], self.experts, false)?;
        if inputs[0].elements() != pairs {
            return Err(Error::shape(
                self.name(),
                format!("the experts are {} for {pairs} pairs", inputs[0]),
            ));
        }
        expect_i32(self.name(), "the experts", &inputs[0], inputs[0].dims())?;
        expect_f32(self.name(), "the gates", &inputs[1], inputs[0].dims())?;
        Ok(inputs[..2].to_vec())
    }

    fn differentiable(&self, input: usize) -> bool {
        input == 1
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(upstream) = context.gradient(1) else {
            return Ok(());
        };
        let op = LimitCapacityBackward {
            experts: self.experts,
        };
        let kept = context.output(0);
        let d_gates = context.graph.apply1(op, &[kept, upstream])?;
        context.add(1, d_gates)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let pairs = io.inputs[0].elements();
        // One expert may have them all, and a bit of the limit is found in a pass over them.
        let per_turn = match self.policy {
            DropPolicy::Gate => WORKGROUP / PASSES,
            DropPolicy::Position => WORKGROUP,
        };
        expect_turns(self.name(), [pairs, per_turn], "pairs", capabilities)?;
        let launch = launch("forward", pairs, self.experts, self.capacity.min(pairs))
            .constant("BY_GATE", self.policy == DropPolicy::Gate)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, Slot::Input(3))
            .write(5, Slot::Output(0))
            .write(6, Slot::Output(1))
            .folded(self.experts, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl LimitCapacityBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (kept, upstream) = (io.ints(0)?, io.floats(1)?);
        for ((d, &expert), &upstream) in io.floats_out(0)?.iter_mut().zip(kept).zip(upstream) {
            *d = if (expert as usize) < self.experts {
                upstream
            } else {
                R::zero()
            };
        }
        Ok(())
    }
}

impl Op for LimitCapacityBackward {
    fn name(&self) -> &'static str {
        "limit_capacity_backward"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_f32(self.name(), "the gradient", &inputs[1], inputs[0].dims())?;
        Ok(inputs[1..].to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let pairs = io.inputs[0].elements();
        let launch = launch("backward", pairs, self.experts, 0)
            .read(7, Slot::Input(0))
            .read(8, Slot::Input(1))
            .write(9, Slot::Output(0))
            .folded(pairs.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
