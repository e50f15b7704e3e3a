//! Top-k softmax routing (section 1 of the mathematics): which experts a token goes to, and with which weights.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Segments, dims_f32, expect_count, expect_f32, expect_i32, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Where each token goes, and with which weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routed {
    /// The weights of the chosen experts, `[tokens, top_k]`.
    pub gates: Value,
    /// The chosen experts, and the (token, slot) pairs sorted by them.
    pub segments: Segments,
}

impl Routed {
    /// The experts chosen, `i32 [tokens, top_k]`, largest logit first; of equal logits the lower expert first.
    #[must_use]
    pub fn experts(&self) -> Value {
        self.segments.experts()
    }
}

#[derive(Clone, Copy, Debug)]
struct Route {
    top_k: usize,
    renormalize: bool,
}

#[derive(Clone, Copy, Debug)]
struct RouteBackward {
    renormalize: bool,
}

impl Graph {
    /// Chooses the `top_k` experts with the largest of `logits` (`[tokens, experts]`) for each token. The gates are the softmax
    /// over the chosen (`renormalize`), or the chosen's part of the softmax over all. A NaN sorts last.
    ///
    /// # Errors
    /// [`Error::Setting`] if `top_k` is 0 or more than there are experts, [`Error::Shape`] if the logits are not a matrix.
    pub fn route(&mut self, logits: Value, top_k: usize, renormalize: bool) -> Result<Routed> {
        let [_, experts] = dims_f32("route", "the logits", self.ty(logits)?)?;
        let outputs = self.apply(Route { top_k, renormalize }, &[logits])?;
        let segments = self.segments(outputs[0], experts)?;
        Ok(Routed {
            gates: outputs[1],
            segments,
        })
    }
}

/// Larger key, earlier choice: the order of floats as integers, -0 equal to 0, NaN below everything.
fn key<R: Real>(logit: R) -> f64 {
    if logit.is_nan() {
        f64::NEG_INFINITY
    } else {
        logit.f64().max(f64::MIN)
    }
}

impl Route {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let experts = io.input_type(0)?.shape.last();
        let logits = io.floats(0)?;
        let (chosen, gates) = (io.ints_out(0)?, io.floats_out(1)?);
        let tokens = logits
            .par_chunks(experts)
            .zip(chosen.par_chunks_mut(self.top_k))
            .zip(gates.par_chunks_mut(self.top_k));
        tokens.for_each(|((logits, chosen), gates)| {
            let mut order: Vec<usize> = (0..experts).collect();
            // Stable: equal logits stay in the order of the experts.
            order.sort_by(|&a, &b| key(logits[b]).total_cmp(&key(logits[a])));
            let largest = logits[order[0]];
            let counted = if self.renormalize {
                &order[..self.top_k]
            } else {
                &order[..]
            };
            let sum: R = counted
                .iter()
                .map(|&expert| (logits[expert] - largest).exp())
                .sum();
            for ((chosen, gate), &expert) in chosen.iter_mut().zip(gates).zip(&order) {
                *chosen = expert as i32;
                *gate = (logits[expert] - largest).exp() / sum;
            }
        });
        Ok(())
    }
}

impl Op for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        let [tokens, experts] = dims_f32(self.name(), "the logits", &inputs[0])?;
        if self.top_k == 0 || self.top_k > experts {
            return Err(Error::setting(
                "top_k",
                self.top_k,
                format!("there are {experts} experts, at least 1 is chosen"),
            ));
        }
        Ok(vec![
            TensorType::i32([tokens, self.top_k]),
            TensorType::f32([tokens, self.top_k]),
        ])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(d_gates) = context.gradient(1) else {
            return Ok(());
        };
        let inputs = [
            context.input(0),
            context.output(0),
            context.output(1),
            d_gates,
        ];
        let d_logits = context.graph.apply1(
            RouteBackward {
                renormalize: self.renormalize,
            },
            &inputs,
        )?;
        context.add(0, d_logits)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = Launch::new(shader!("route"), "forward")
            .constant("RENORMALIZE", self.renormalize)
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .write(3, Slot::Output(1))
            .param(tokens)
            .param(experts)
            .param(self.top_k)
            .folded(tokens.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl RouteBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, chosen, gates, d_gates) =
            (io.floats(0)?, io.ints(1)?, io.floats(2)?, io.floats(3)?);
        let (experts, top_k) = (
            io.input_type(0)?.shape.last(),
            io.input_type(1)?.shape.last(),
        );
        let d_logits = io.floats_out(0)?;
        d_logits
            .par_chunks_mut(experts)
            .enumerate()
            .for_each(|(token, d_logits)| {
                let slots = token * top_k..(token + 1) * top_k;
                let (chosen, gates, d_gates) = (
                    &chosen[slots.clone()],
                    &gates[slots.clone()],
                    &d_gates[slots],
                );
                let logits = &logits[token * experts..(token + 1) * experts];
                let mean: R = gates
                    .iter()
                    .zip(d_gates)
                    .map(|(&gate, &d_gate)| gate * d_gate)
                    .sum();
                for (d_logit, &logit) in d_logits.iter_mut().zip(logits) {
                    // The first gate belongs to the largest logit: all probabilities follow from it.
                    let probability = gates[0] * (logit - logits[chosen[0] as usize]).exp();
                    *d_logit = if self.renormalize {
                        R::zero()
                    } else {
                        -probability * mean
                    };
                }
                for ((&expert, &gate), &d_gate) in chosen.iter().zip(gates).zip(d_gates) {
                    // g_e sum g_i (G_e - G_i) equals g_e (G_e - m), but keeps its digits when one gate is nearly 1.
                    let part = if self.renormalize {
                        gates
                            .iter()
                            .zip(d_gates)
                            .map(|(&g, &d)| g * (d_gate - d))
                            .sum()
                    } else {
                        d_gate
                    };
                    d_logits[expert as usize] += gate * part;
                }
            });
        Ok(())
    }
}

impl Op for RouteBackward {
    fn name(&self) -> &'static str {
        "route_backward"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4)?;
        let [tokens, top_k] = dims_f32(self.name(), "the gates", &inputs[2])?;
        expect_i32(self.name(), "the experts", &inputs[1], &[tokens, top_k])?;
        expect_f32(
            self.name(),
            "the gradient of the gates",
            &inputs[3],
            &[tokens, top_k],
        )?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = Launch::new(shader!("route"), "backward")
            .constant("RENORMALIZE", self.renormalize)
            .read(1, Slot::Input(0))
            .read(4, Slot::Input(1))
            .read(5, Slot::Input(2))
            .read(6, Slot::Input(3))
            .write(7, Slot::Output(0))
            .param(tokens)
            .param(experts)
            .param(io.inputs[1].shape.last())
            .folded((tokens * experts).div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
