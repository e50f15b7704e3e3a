//! Top-k routing (section 1 of the mathematics): which experts a token goes to, and with which weights.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::route_and_sort::RouteAndSort;
use crate::ops::silu::sigmoids;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Segments, Work, dims_f32, expect_count, expect_f32, expect_i32,
    shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;
/// Numbers a token that the forward kernel keeps for the backward one.
const NORMS: usize = 4;

/// Where each token goes, and with which weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routed {
    /// The weights of the chosen experts, `[tokens, top_k]`.
    pub gates: Value,
    /// The chosen experts, and the (token, slot) pairs sorted by them.
    pub segments: Segments,
}

impl Routed {
    /// The experts chosen, `i32 [tokens, top_k]`, first choice first; of equal choices the lower expert first.
    #[must_use]
    pub fn experts(&self) -> Value {
        self.segments.experts()
    }
}

/// What a router makes of its logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// The softmax over the experts.
    #[default]
    Softmax,
    /// The sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437, equation 15).
    Sigmoid,
}

/// How [`Graph::route_with`] makes experts and gates of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// How many experts each token takes.
    pub top_k: usize,
    /// The gates are the scores divided by their sum over the chosen; if not, the scores as they are.
    pub renormalize: bool,
    /// What becomes of the logits.
    pub score: Score,
    /// Multiplies the gates.
    pub scale: f32,
}

impl Route {
    /// Softmax over the chosen `top_k`.
    #[must_use]
    pub fn new(top_k: usize) -> Self {
        Self {
            top_k,
            renormalize: true,
            score: Score::Softmax,
            scale: 1.0,
        }
    }

    /// How many of a token's logits become scores: all, or only the chosen where the softmax is over those.
    fn scored(self, experts: usize) -> usize {
        if self.renormalize && self.score == Score::Softmax {
            self.top_k
        } else {
            experts
        }
    }
}

/// Operands logits, the selection bias if `biased`. Results experts, gates, norms `[tokens, 4]`: the exponent taken off, the sum, and the part of
/// the softmax that is not chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RouteForward {
    pub(crate) route: Route,
    pub(crate) biased: bool,
}

/// Operands logits, experts, gates, norms, d_gates.
#[derive(Clone, Copy, Debug)]
struct RouteBackward(Route);

impl Graph {
    /// Chooses the `top_k` experts with the largest of `logits` (`[tokens, experts]`) for each token. The gates are the softmax
    /// over the chosen (`renormalize`), or the chosen's part of the softmax over all. A NaN sorts last.
    ///
    /// Up to 4,096 tokens and 64 experts one kernel routes and sorts.
    ///
    /// # Errors
    /// [`Error::Setting`] if `top_k` is 0 or more than there are experts, [`Error::Shape`] if the logits are not a matrix.
    pub fn route(&mut self, logits: Value, top_k: usize, renormalize: bool) -> Result<Routed> {
        let route = Route {
            renormalize,
            ..Route::new(top_k)
        };
        self.route_with(logits, None, route)
    }

    /// [`Graph::route`] with all its settings. With a `selection_bias` (`[experts]`) experts are chosen by score plus bias (softmax: by
    /// logit plus bias), while the gates do not see it and no gradient flows to it (DeepSeek-V3, arXiv 2412.19437, equation 16).
    ///
    /// # Errors
    /// As [`Graph::route`]; [`Error::Setting`] if the scale is not a positive number, [`Error::Shape`] if the bias is not `[experts]`.
    pub fn route_with(
        &mut self,
        logits: Value,
        selection_bias: Option<Value>,
        route: Route,
    ) -> Result<Routed> {
        let [tokens, experts] = dims_f32("route", "the logits", self.ty(logits)?)?;
        let forward = RouteForward {
            route,
            biased: selection_bias.is_some(),
        };
        let inputs: Vec<Value> = [logits].into_iter().chain(selection_bias).collect();
        let together = RouteAndSort::new(forward, [tokens, experts]);
        let (gates, segments) = if let Some(op) = together {
            let outputs = self.apply(op, &inputs)?;
            let segments = Segments {
                experts: outputs[0],
                order: outputs[3],
                offsets: outputs[4],
                none: false,
            };
            (outputs[1], segments)
        } else {
            let outputs = self.apply(forward, &inputs)?;
            (outputs[1], self.segments(outputs[0], experts)?)
        };
        Ok(Routed { gates, segments })
    }
}

/// Larger key, earlier choice: the order of floats as integers, -0 equal to 0, NaN below everything.
fn key<R: Real>(score: R) -> f64 {
    if score.is_nan() {
        f64::NEG_INFINITY
    } else {
        // -0 + 0 is 0.
        score.f64().max(f64::MIN) + 0.0
    }
}

impl Route {
    /// The weight of a logit is `exp(exponent) / divisor`.
    fn exponent<R: Real>(&self, logit: R) -> R {
        match self.score {
            Score::Softmax => logit,
            Score::Sigmoid => logit.min(R::zero()),
        }
    }

    fn divisor<R: Real>(&self, logit: R) -> R {
        match self.score {
            Score::Softmax => R::one(),
            Score::Sigmoid => R::one() + (-logit.abs()).exp(),
        }
    }

    fn launch(&self, entry: &'static str, sizes: [usize; 2], biased: bool) -> Launch {
        self.with_settings(
            Launch::new(shader!("route", "route_token"), entry),
            sizes,
            biased,
        )
    }

    /// The constants and parameters that every kernel that routes begins with.
    pub(crate) fn with_settings(
        &self,
        launch: Launch,
        [tokens, experts]: [usize; 2],
        biased: bool,
    ) -> Launch {
        launch
            .constant("RENORMALIZE", self.renormalize)
            .constant("SIGMOID", self.score == Score::Sigmoid)
            .constant("BIASED", biased)
            .param(tokens)
            .param(experts)
            .param(self.top_k)
            .param(self.scale)
            .param(1.0 / self.scale)
    }
}

impl RouteForward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        self.host_route(&mut io).map(|_| ())
    }

    /// Writes experts, gates and norms, and returns the experts.
    pub(crate) fn host_route<'a, R: Real>(&self, io: &mut HostIo<'a, R>) -> Result<&'a [i32]> {
        let Route {
            top_k,
            renormalize,
            score,
            scale,
        } = self.route;
        let experts = io.input_type(0)?.shape.last();
        let logits = io.floats(0)?;
        let bias = if self.biased {
            Some(io.floats(1)?)
        } else {
            None
        };
        let (chosen, gates, norms) = (io.ints_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        let selection_key = |expert: usize, logit: R| {
            key(match (bias, score) {
                (None, _) => logit,
                (Some(bias), Score::Softmax) => logit + bias[expert],
                (Some(bias), Score::Sigmoid) => sigmoids(logit).0 + bias[expert],
            })
        };
        let tokens = logits
            .par_chunks(experts)
            .zip(chosen.par_chunks_mut(top_k))
            .zip(gates.par_chunks_mut(top_k))
            .zip(norms.par_chunks_mut(NORMS));
        tokens.for_each(|(((logits, chosen), gates), norms)| {
            let mut order: Vec<usize> = (0..experts).collect();
            // Stable: equal ones stay in the order of the experts.
            order.sort_by(|&a, &b| {
                selection_key(b, logits[b]).total_cmp(&selection_key(a, logits[a]))
            });
            let counted = if renormalize {
                &order[..top_k]
            } else {
                &order[..]
            };
            let plain = !renormalize && score == Score::Sigmoid;
            let largest = if plain {
                R::zero()
            } else {
                let exponents = counted.iter().map(|&i| self.route.exponent(logits[i]));
                exponents.fold(R::neg_infinity(), R::max)
            };
            let weight = |expert: usize| {
                let logit = logits[expert];
                (self.route.exponent(logit) - largest).exp() / self.route.divisor(logit)
            };
            let sum: R = if plain {
                R::one()
            } else {
                counted.iter().map(|&expert| weight(expert)).sum()
            };
            for ((chosen, gate), &expert) in chosen.iter_mut().zip(gates).zip(&order) {
                *chosen = expert as i32;
                *gate = R::of(f64::from(scale)) * (weight(expert) / sum);
            }
            let rest: R = if renormalize || plain {
                R::zero()
            } else {
                let unchosen = order[top_k..].iter();
                unchosen.map(|&expert| weight(expert) / sum).sum()
            };
            norms.copy_from_slice(&[largest, sum, rest, R::zero()]);
        });
        Ok(chosen)
    }
}

impl Op for RouteForward {
    fn name(&self) -> &'static str {
        "route"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(4 * tokens * self.route.scored(experts)))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1 + usize::from(self.biased))?;
        let [tokens, experts] = dims_f32(self.name(), "the logits", &inputs[0])?;
        let Route { top_k, scale, .. } = self.route;
        if top_k == 0 || top_k > experts {
            return Err(Error::setting(
                "top_k",
                top_k,
                format!("there are {experts} experts, at least 1 is chosen"),
            ));
        }
        if !(scale.is_normal() && scale > 0.0 && (1.0 / scale).is_normal()) {
            return Err(Error::setting(
                "scale",
                scale,
                "the gates are multiplied by a positive number",
            ));
        }
        if self.biased {
            expect_f32(self.name(), "the selection bias", &inputs[1], &[experts])?;
        }
        Ok(vec![
            TensorType::i32([tokens, top_k]),
            TensorType::f32([tokens, top_k]),
            TensorType::f32([tokens, NORMS]),
        ])
    }

    fn differentiable(&self, input: usize) -> bool {
        input == 0
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(d_gates) = context.gradient(1) else {
            return Ok(());
        };
        let inputs = [
            context.input(0),
            context.output(0),
            context.output(1),
            context.output(2),
            d_gates,
        ];
        let d_logits = context.graph.apply1(RouteBackward(self.route), &inputs)?;
        context.add(0, d_logits)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        // Without a bias the binding is not read: any buffer will do.
        let bias = Slot::Input(usize::from(self.biased));
        let launch = self
            .route
            .launch("forward", [tokens, experts], self.biased)
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .write(3, Slot::Output(1))
            .read(8, bias)
            .write(9, Slot::Output(2))
            .folded(tokens.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl RouteBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let Route {
            top_k,
            renormalize,
            score,
            scale,
        } = self.0;
        let (logits, chosen, gates) = (io.floats(0)?, io.ints(1)?, io.floats(2)?);
        let (norms, d_gates) = (io.floats(3)?, io.floats(4)?);
        let experts = io.input_type(0)?.shape.last();
        let inverse_scale = R::of(1.0 / f64::from(scale));
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
                let norms = &norms[NORMS * token..];
                let (largest, sum, rest) = (norms[0], norms[1], norms[2]);
                let pairs = || gates.iter().zip(d_gates);
                let mean: R = pairs().map(|(&gate, &d_gate)| gate * d_gate).sum();
                for (d_logit, &logit) in d_logits.iter_mut().zip(logits) {
                    *d_logit = if renormalize || score == Score::Sigmoid {
                        R::zero()
                    } else {
                        -((logit - largest).exp() / sum) * mean
                    };
                }
                for ((&expert, &gate), &d_gate) in chosen.iter().zip(gates).zip(d_gates) {
                    // Sums of differences: G_e - m keeps its digits when one gate is nearly 1.
                    let differences = || -> R {
                        pairs()
                            .map(|(&g, &d)| inverse_scale * g * (d_gate - d))
                            .sum()
                    };
                    let part = match score {
                        _ if renormalize => differences(),
                        Score::Softmax => differences() + rest * d_gate,
                        Score::Sigmoid => d_gate,
                    };
                    let complement = match score {
                        Score::Softmax => R::one(),
                        Score::Sigmoid => sigmoids(logits[expert as usize]).1,
                    };
                    d_logits[expert as usize] = complement * gate * part;
                }
            });
        Ok(())
    }
}

impl Op for RouteBackward {
    fn name(&self) -> &'static str {
        "route_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(4 * tokens * self.0.scored(experts)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 5)?;
        let [tokens, top_k] = dims_f32(self.name(), "the gates", &inputs[2])?;
        expect_i32(self.name(), "the experts", &inputs[1], &[tokens, top_k])?;
        expect_f32(self.name(), "the norms", &inputs[3], &[tokens, NORMS])?;
        expect_f32(
            self.name(),
            "the gradient of the gates",
            &inputs[4],
            &[tokens, top_k],
        )?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = self
            .0
            .launch("backward", [tokens, experts], false)
            .read(1, Slot::Input(0))
            .read(4, Slot::Input(1))
            .read(5, Slot::Input(2))
            .read(6, Slot::Input(4))
            .write(7, Slot::Output(0))
            .read(10, Slot::Input(3))
            .folded((tokens * experts).div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
