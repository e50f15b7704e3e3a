//! The update of a router's selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): balance without a loss.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Segments, dims_f32, expect_count, expect_i32,
    shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Operands bias, offsets before dropping. Result: the bias, updated.
#[derive(Clone, Copy, Debug)]
struct UpdateBias {
    rate: f32,
}

impl Graph {
    /// `b[e] += rate * sign(mean count - count[e])`, in place, with the counts of the pairs that chose each expert in this run.
    /// `bias` is a parameter `[experts]`. No gradient is involved. Returns the updated parameter.
    ///
    /// # Errors
    /// [`Error::Shape`] if `bias` is not a parameter of as many experts as `chosen` has, [`Error::Setting`] if the rate is not a finite number.
    pub fn update_selection_bias(
        &mut self,
        bias: Value,
        chosen: Segments,
        rate: f32,
    ) -> Result<Value> {
        self.apply1(UpdateBias { rate }, &[bias, chosen.offsets])
    }
}

impl UpdateBias {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let offsets = io.ints(1)?;
        let bias = io.floats_out(0)?;
        let experts = bias.len() as i64;
        let total = i64::from(offsets[bias.len()]);
        for (bias, ends) in bias.iter_mut().zip(offsets.windows(2)) {
            let direction = (total - i64::from(ends[1] - ends[0]) * experts).signum();
            *bias += R::of(f64::from(self.rate)) * R::of(direction as f64);
        }
        Ok(())
    }
}

impl Op for UpdateBias {
    fn name(&self) -> &'static str {
        "update_selection_bias"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [experts] = dims_f32(self.name(), "the bias", &inputs[0])?;
        expect_i32(self.name(), "the offsets", &inputs[1], &[experts + 1])?;
        if !self.rate.is_finite() {
            return Err(Error::setting("rate", self.rate, "must be finite"));
        }
        Ok(inputs[..1].to_vec())
    }

    fn differentiable(&self, _input: usize) -> bool {
        false
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: AliasKind::Update,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let experts = io.inputs[0].elements();
        let launch = Launch::new(shader!("selection_bias"), "forward")
            .read(1, Slot::Input(1))
            .write(2, Slot::Output(0))
            .param(experts)
            .param(self.rate)
            .folded(experts.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
