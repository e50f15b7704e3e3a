//! AdamW as part of a graph: the update is recorded with the forward and the backward pass and runs in the same submission.

use crate::error::{Error, Result};
use crate::graph::{Gradients, Graph, Init, MASTER, ParameterStore, Session, Storage, Value};
use crate::ops::{AdamWConstants, LossScaling};
use crate::tensor::{Tensor, TensorType};
use crate::train::loss_scaling::LOSS_SCALE;

/// The name of the input through which the learning rate reaches the device.
const SCHEDULE_INPUT: &str = "adamw.schedule";

/// How to build an AdamW step. The defaults are PyTorch's, without clipping.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdamW {
    /// The decay rates and the rest.
    pub constants: AdamWConstants,
    /// Scale all gradients together down to this norm where theirs is larger.
    pub max_norm: Option<f32>,
}

/// An AdamW step that was added to a graph.
#[derive(Clone, Debug)]
pub struct Optimizer {
    constants: AdamWConstants,
    schedule: Value,
    /// `[norm, scale]` of the gradients, before clipping; kept as an output. `None` without clipping and loss scaling. With loss scaling
    /// the norm is of the unscaled gradients, and both are 0 for a step that was skipped.
    pub norm: Option<Value>,
    /// `[scale, good steps since it changed, steps taken, steps skipped]` after the step; kept as an output. `None` without loss scaling.
    pub loss_scale: Option<Value>,
    scaling: Option<LossScaling>,
    /// Steps done so far.
    step: u64,
}

/// A norm that no finite gradient has: clipping to it does nothing. Over the smallest norm there is, 1e-6, it is still finite.
const UNLIMITED: f32 = 1e30;

impl AdamW {
    /// Adds the update of every parameter that has a gradient to the graph. The moments are parameters of the store, named
    /// `adamw.first.NAME` and `adamw.second.NAME`; they start at zero and are saved with it. A parameter stored in 16 bits has a master
    /// copy in f32, `adamw.master.NAME`, which is what is updated; the parameter follows it, rounded.
    ///
    /// Gradients of [`Graph::backward_scaled`] are divided by the scale; a step whose gradients are not finite changes no parameter that
    /// is trained, and is not counted in the bias corrections.
    ///
    /// # Errors
    /// [`Error::Setting`] if a constant makes no sense or there is nothing to update.
    pub fn add_to(&self, graph: &mut Graph, gradients: &Gradients) -> Result<Optimizer> {
        let AdamWConstants {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.constants;
        for (setting, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::setting(
                    setting,
                    beta,
                    "must be at least 0 and less than 1",
                ));
            }
        }
        for (setting, value) in [("epsilon", epsilon), ("weight_decay", weight_decay)] {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::setting(setting, value, "must not be negative"));
            }
        }
        let trained = gradients.trained(graph)?;
        let schedule = graph.input(SCHEDULE_INPUT, TensorType::f32([3]))?;
        let limit = match (self.max_norm, gradients.scaling) {
            // Without clipping the norm is still what tells an overflow.
            (None, Some(_)) => Some(UNLIMITED),
            (max_norm, _) => max_norm,
        };
        let mut norm = match limit {
            Some(max_norm) => {
                let all: Vec<Value> = trained.iter().map(|&(.., gradient)| gradient).collect();
                Some(graph.gradient_norm(&all, max_norm)?)
            }
            None => None,
        };
        let mut step_schedule = schedule;
        let mut loss_scale = None;
        if let (Some(scaling), Some(scaled_norm), Some(max_norm)) = (gradients.scaling, norm, limit)
        {
            let state = scaling.state(graph)?;
            let operands = [state, scaled_norm, schedule];
            let step = graph.update_loss_scale(operands, scaling, self.constants, max_norm)?;
            step_schedule = step.schedule;
            norm = Some(step.clip);
            loss_scale = Some(step.state);
        }
        for value in [norm, loss_scale].into_iter().flatten() {
            graph.output(value)?;
        }
        for (spec, parameter, gradient) in trained {
            let (name, shape) = (spec.name, spec.ty.shape);
            let moment = |which: &str| format!("adamw.{which}.{name}");
            let master_name = format!("{MASTER}{name}");
            let gradient = graph.reshape(gradient, &shape)?;
            let (first, second, master) = graph.in_f32(|graph| {
                let first = graph.parameter(&moment("first"), &shape, Init::Zeros, false)?;
                let second = graph.parameter(&moment("second"), &shape, Init::Zeros, false)?;
                let master = match spec.storage {
                    Storage::F32 => parameter,
                    Storage::F16 => {
                        let init = Init::Copy { of: name.clone() };
                        graph.parameter(&master_name, &shape, init, false)?
                    }
                };
                Ok::<_, Error>((first, second, master))
            })?;
            let updated = graph.adamw_step(
                master,
                [first, second],
                gradient,
                step_schedule,
                norm,
                self.constants,
            )?;
            if master != parameter {
                graph.assign(parameter, updated)?;
            }
        }
        Ok(Optimizer {
            constants: self.constants,
            schedule,
            norm,
            loss_scale,
            scaling: gradients.scaling,
            step: 0,
        })
    }
}

impl Optimizer {
    /// Sets the learning rate of the next run and counts it as a step. To be called before every run of the session.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rate is negative or not finite, [`Error::ForeignValue`] if the session is of another graph.
    pub fn prepare(&mut self, session: &mut Session, learning_rate: f64) -> Result<()> {
        if !learning_rate.is_finite() || learning_rate < 0.0 {
            return Err(Error::setting(
                "learning_rate",
                learning_rate,
                "must be finite and not negative",
            ));
        }
        let step = (self.step + 1) as f64;
        // In f64: in f32, 1 - beta2^t has no correct digits for the first steps.
        let correction1 = 1.0 / (1.0 - self.constants.beta1.powf(step));
        let correction2 = 1.0 / (1.0 - self.constants.beta2.powf(step)).sqrt();
        session.write(
            self.schedule,
            &Tensor::f64([3], vec![learning_rate, correction1, correction2])?,
        )?;
        self.step += 1;
        Ok(())
    }

    /// Steps prepared so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Goes on from a step, after the store was loaded from a file.
    pub fn resume_at(&mut self, step: u64) {
        self.step = step;
    }

    /// Sets all moments in a store back to zero and the step to 0. A loss scale starts again; master copies stay
    /// as they are.
    ///
    /// # Errors
    /// What writing to the store returns.
    pub fn reset(&mut self, store: &ParameterStore) -> Result<()> {
        let is_state = |name: &String| name.starts_with("adamw.") && !name.starts_with(MASTER);
        for name in store.names().iter().filter(|name| is_state(name)) {
            let fresh = if name == LOSS_SCALE {
                self.scaling.map(|scaling| scaling.start()).transpose()?
            } else {
                store.ty(name).map(|ty| Tensor::zeros(&ty))
            };
            if let Some(fresh) = fresh {
                store.insert(name, &fresh)?;
            }
        }
        self.step = 0;
        Ok(())
    }
}
