//! One step of AdamW, in place: decoupled weight decay first, then the moments, then the step, as PyTorch does it.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks};
use crate::ops::spread::element_wise;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_f32, shader,
};
use crate::tensor::TensorType;

/// The constants of AdamW (Loshchilov and Hutter, arXiv 1711.05101), with PyTorch's defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConstants {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, after its bias correction.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConstants {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-2,
        }
    }
}

/// Inputs: parameter, first moment, second moment, gradient, schedule `[3]`, and `[norm, scale]` of the gradients if `clipped`.
#[derive(Clone, Copy, Debug)]
struct AdamWStep {
    constants: AdamWConstants,
    clipped: bool,
}

impl Graph {
    /// Updates a parameter and its two moments in place. `schedule` is `[learning rate, 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)]` for step
    /// t, from 1; `clip`, if given, is `[norm, scale]` of [`Graph::gradient_norm`]: the gradient is multiplied by the scale. A scale of 0
    /// means to skip the step: nothing changes.
    /// Returns the updated parameter; whoever reads the parameter after this must read that value.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ or one of the first three is not a parameter.
    pub fn adamw_step(
        &mut self,
        parameter: Value,
        moments: [Value; 2],
        gradient: Value,
        schedule: Value,
        clip: Option<Value>,
        constants: AdamWConstants,
    ) -> Result<Value> {
        let op = AdamWStep {
            constants,
            clipped: clip.is_some(),
        };
        let inputs = [parameter, moments[0], moments[1], gradient, schedule];
        self.apply1(op, &inputs.into_iter().chain(clip).collect::<Vec<_>>())
    }
}

impl AdamWStep {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (gradient, schedule) = (io.floats(3)?, io.floats(4)?);
        let clip = if self.clipped {
            io.floats(5)?[1]
        } else {
            R::one()
        };
        let (parameter, first, second) = (io.floats_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        if clip == R::zero() {
            return Ok(());
        }
        let AdamWConstants {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.constants;
        let (rate, correction1, correction2) = (schedule[0], schedule[1], schedule[2]);
        let keep = R::one() - rate * R::of(weight_decay);
        let [b1, b2, c1, c2] = [beta1, beta2, 1.0 - beta1, 1.0 - beta2].map(R::of);
        let outputs = [parameter, first, second];
        for_chunks(gradient.len(), LIGHT_CHUNK, outputs, |at, [theta, m, v]| {
            let moments = m.iter_mut().zip(v);
            for ((theta, (m, v)), &g) in theta.iter_mut().zip(moments).zip(&gradient[at]) {
                let g = g * clip;
                *m = b1 * *m + c1 * g;
                *v = b2 * *v + c2 * g * g;
                *theta = *theta * keep
                    - rate * correction1 * *m / ((*v).sqrt() * correction2 + R::of(epsilon));
            }
        });
        Ok(())
    }
}

impl Op for AdamWStep {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // Three for the first moment, four for the second, seven for the parameter, one to clip.
        let each = 14 + usize::from(self.clipped);
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * each))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 5 + usize::from(self.clipped))?;
        let dims = inputs[0].dims();
        for (name, ty) in [
            "the parameter",
            "the first moment",
            "the second moment",
            "the gradient",
        ]
        .iter()
        .zip(inputs)
        {
            expect_f32(self.name(), name, ty, dims)?;
        }
        expect_f32(self.name(), "the schedule", &inputs[4], &[3])?;
        if self.clipped {
            expect_f32(self.name(), "the clipping scale", &inputs[5], &[2])?;
        }
        Ok(inputs[..3].to_vec())
    }

    fn aliases(&self) -> Vec<Alias> {
        (0..3)
            .map(|index| Alias {
                input: index,
                output: index,
                kind: AliasKind::Update,
            })
            .collect()
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.inputs[0].elements();
        let AdamWConstants {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.constants;
        // Without clipping the binding is not read: any buffer will do.
        let clip = if self.clipped {
            Slot::Input(5)
        } else {
            Slot::Input(4)
        };
        let launch = Launch::new(shader!("adamw"), "forward")
            .constant("CLIPPED", self.clipped)
            .read(1, Slot::Input(3))
            .read(2, Slot::Input(4))
            .read(3, clip)
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .write(6, Slot::Output(2))
            .param(elements)
            .param(beta1 as f32)
            .param(beta2 as f32)
            .param((1.0 - beta1) as f32)
            .param((1.0 - beta2) as f32)
            .param(epsilon as f32)
            .param(weight_decay as f32);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
