//! Gradients of a scaled loss: for activations stored in 16 bits, whose gradients would else be rounded to 0.

use crate::error::{Error, Result};
use crate::graph::{Gradients, Graph, Init, Value};
use crate::ops::{LossScaling, STATE_LENGTH};
use crate::tensor::Tensor;

/// The parameter that holds the scale and the counts, so that training can be resumed.
pub(crate) const LOSS_SCALE: &str = "adamw.loss_scale";

impl LossScaling {
    fn check(&self) -> Result<()> {
        let Self {
            initial,
            growth,
            backoff,
            interval,
        } = *self;
        let wrong = |setting, value: f32, reason: &str| Err(Error::setting(setting, value, reason));
        if !initial.is_finite() || initial <= 0.0 {
            return wrong("initial", initial, "a scale must be positive and finite");
        }
        if !growth.is_finite() || growth < 1.0 {
            return wrong("growth", growth, "must be at least 1 and finite");
        }
        if backoff.is_nan() || backoff <= 0.0 || backoff >= 1.0 {
            return wrong("backoff", backoff, "must be between 0 and 1");
        }
        // The count is a float on the device.
        if interval == 0 || interval >= 1 << 24 {
            return Err(Error::setting(
                "interval",
                interval,
                "must be at least 1 and less than 2^24 steps",
            ));
        }
        Ok(())
    }

    /// The state before the first step.
    pub(crate) fn start(&self) -> Result<Tensor> {
        let mut state = vec![0.0; STATE_LENGTH];
        state[0] = self.initial;
        Tensor::f32([STATE_LENGTH], state)
    }

    /// The state in a graph: `[scale, good steps since it changed, steps taken, steps skipped]`.
    pub(crate) fn state(&self, graph: &mut Graph) -> Result<Value> {
        self.check()?;
        let init = Init::Given(self.start()?);
        graph.in_f32(|graph| graph.parameter(LOSS_SCALE, [STATE_LENGTH], init, false))
    }
}

impl Graph {
    /// [`Graph::backward`] of the loss times a scale that lives on the device. An optimiser built on these gradients divides by
    /// it, skips the steps whose gradients are not finite, and moves the scale as `scaling` says. The state is the parameter
    /// `adamw.loss_scale` `[4]`: the scale, good steps since it changed, steps taken, steps skipped.
    ///
    /// Checked mode takes an overflow for the mistake that it elsewhere is: a step that is to be skipped is an error there. Begin with a scale
    /// that does not overflow, or do not check.
    ///
    /// # Errors
    /// As [`Graph::backward`], and [`Error::Setting`] if a number of `scaling` makes no sense.
    pub fn backward_scaled(&mut self, loss: Value, scaling: LossScaling) -> Result<Gradients> {
        let ty = self.loss_type(loss)?;
        let state = scaling.state(self)?;
        let scale = self.current_loss_scale(state)?;
        let seed = self.reshape(scale, &ty.shape)?;
        self.backward_from(loss, seed, Some(scaling))
    }
}
