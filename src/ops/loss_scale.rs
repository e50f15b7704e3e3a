//! Dynamic loss scaling on the device: a step whose gradients overflow is skipped without the host having to look.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::{
    AdamWConstants, Alias, AliasKind, HostIo, LaunchTypes, Op, Real, expect_count, expect_f32,
    shader,
};
use crate::tensor::TensorType;

/// What the state holds: the scale, good steps since it last changed, steps taken, steps skipped.
pub(crate) const STATE_LENGTH: usize = 4;
/// The largest scale: beyond it a loss of 1 would itself be near the end of f32.
const LARGEST: f32 = 1e30;

/// How the scale moves, with the defaults of PyTorch's gradient scaler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaling {
    /// The scale at the start.
    pub initial: f32,
    /// What it is multiplied by after `interval` steps without overflow.
    pub growth: f32,
    /// What it is multiplied by after an overflow.
    pub backoff: f32,
    /// Steps without overflow until it grows.
    pub interval: u32,
}

impl Default for LossScaling {
    fn default() -> Self {
        Self {
            initial: 65_536.0,
            growth: 2.0,
            backoff: 0.5,
            interval: 2000,
        }
    }
}

/// Input: the state. Output: the scale, a scalar.
#[derive(Clone, Copy, Debug)]
struct CurrentScale;

/// Inputs: the state, `[norm, _]` of the scaled gradients, the schedule `[rate, _, _]`. Outputs: the state, the schedule `[3]` and the
/// `[norm, scale]` for the optimiser.
#[derive(Clone, Copy, Debug)]
struct UpdateScale {
    scaling: LossScaling,
    constants: AdamWConstants,
    max_norm: f32,
}

/// What an optimiser reads after [`Graph::update_loss_scale`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScaledStep {
    pub(crate) state: Value,
    pub(crate) schedule: Value,
    pub(crate) clip: Value,
}

impl Graph {
    /// The scale that a loss-scaling state holds.
    pub(crate) fn current_loss_scale(&mut self, state: Value) -> Result<Value> {
        self.apply1(CurrentScale, &[state])
    }

    /// Moves the scale on, and makes of the norm of the scaled gradients what the optimiser needs: a step that overflowed has a clip
    /// factor of 0.
    pub(crate) fn update_loss_scale(
        &mut self,
        [state, norm, schedule]: [Value; 3],
        scaling: LossScaling,
        constants: AdamWConstants,
        max_norm: f32,
    ) -> Result<ScaledStep> {
        let op = UpdateScale {
            scaling,
            constants,
            max_norm,
        };
        let outputs = self.apply(op, &[state, norm, schedule])?;
        Ok(ScaledStep {
            state: outputs[0],
            schedule: outputs[1],
            clip: outputs[2],
        })
    }
}

/// ln beta as the kernel takes it: a beta of 0 is gone after one step.
fn log_beta(beta: f64) -> f64 {
    beta.ln().max(-1e4)
}

impl CurrentScale {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let scale = io.floats(0)?[0];
        io.floats_out(0)?[0] = scale;
        Ok(())
    }
}

impl Op for CurrentScale {
    fn name(&self) -> &'static str {
        "loss_scale"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_f32(self.name(), "the state", &inputs[0], &[STATE_LENGTH])?;
        Ok(vec![TensorType::f32([])])
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn launches(&self, _io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Launches> {
        let launch = Launch::new(shader!("loss_scale"), "current")
            .read(1, Slot::Input(0))
            .write(5, Slot::Output(0));
        Ok(launch.into())
    }

    host_reference!();
}

impl UpdateScale {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (norm, rate) = (io.floats(1)?[0], io.floats(2)?[0]);
        let (state, schedule, clip) = (io.floats_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        let of = |x: f32| R::of(f64::from(x));
        let LossScaling {
            growth,
            backoff,
            interval,
            ..
        } = self.scaling;
        let scale = state[0];
        if !norm.is_finite() {
            state[0] = (scale * of(backoff)).max(of(f32::MIN_POSITIVE));
            state[1] = R::zero();
            state[3] += R::one();
            schedule.copy_from_slice(&[R::zero(), R::one(), R::one()]);
            clip.fill(R::zero());
            return Ok(());
        }
        state[2] += R::one();
        state[1] += R::one();
        if state[1] >= R::of(f64::from(interval)) {
            state[0] = (scale * of(growth)).min(of(LARGEST));
            state[1] = R::zero();
        }
        let remaining = |beta: f64| -(state[2] * R::of(log_beta(beta))).exp_m1();
        schedule[0] = rate;
        schedule[1] = R::one() / remaining(self.constants.beta1);
        schedule[2] = R::one() / remaining(self.constants.beta2).sqrt();
        let unscaled = norm / scale;
        clip[0] = unscaled;
        clip[1] = (of(self.max_norm) / (unscaled + R::of(1e-6))).min(R::one()) / scale;
        Ok(())
    }
}

impl Op for UpdateScale {
    fn name(&self) -> &'static str {
        "update_loss_scale"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        expect_f32(self.name(), "the state", &inputs[0], &[STATE_LENGTH])?;
        expect_f32(self.name(), "the norm", &inputs[1], &[2])?;
        expect_f32(self.name(), "the schedule", &inputs[2], &[3])?;
        Ok(vec![
            inputs[0].clone(),
            TensorType::f32([3]),
            TensorType::f32([2]),
        ])
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: AliasKind::Update,
        }]
    }

    fn launches(&self, _io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Launches> {
        let UpdateScale {
            scaling,
            constants,
            max_norm,
        } = *self;
        let launch = Launch::new(shader!("loss_scale"), "update")
            .param(scaling.growth)
            .param(scaling.backoff)
            .param(scaling.interval as f32)
            .param(LARGEST)
            .param(max_norm)
            .param(log_beta(constants.beta1) as f32)
            .param(log_beta(constants.beta2) as f32)
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .write(6, Slot::Output(2));
        Ok(launch.into())
    }

    host_reference!();
}
