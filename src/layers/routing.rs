//! Routing: how tokens find their experts. One set of options for every layer that has a router.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::ops::{BalanceForm, DropPolicy, Route, Routed, RouterMetrics, Score, Segments};

/// The most that experts take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// An expert takes at most `factor` times its fair share of the pairs: `ceil(factor * tokens * top_k / experts)`.
    pub factor: f64,
    /// Which of the others are dropped.
    pub drop: DropPolicy,
}

/// How tokens find their experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// How many experts there are.
    pub experts: usize,
    /// How many of them each token takes.
    pub top_k: usize,
    /// The gates are the scores divided by their sum over the chosen experts; if not, the scores as they are.
    pub renormalize: bool,
    /// Scores by softmax over the experts, or by a sigmoid for each (DeepSeek-V3, arXiv 2412.19437, equation 15).
    pub score: Score,
    /// Multiplies the gates (`routed_scaling_factor`).
    pub scale: f32,
    /// Adds a bias to what experts are chosen by, though not to the gates: `NAME.router_bias` `[experts]`, zeros at the start, changed by
    /// [`RouterOutput::update_selection_bias`] and by no gradient (DeepSeek-V3, equation 16).
    pub selection_bias: bool,
    /// In training the router's input is multiplied by numbers uniform in `1 - jitter..1 + jitter` (Switch, arXiv 2101.03961, section
    /// 2.4). 0 for none.
    pub jitter: f32,
    /// The most that experts take; `None` drops nothing.
    pub capacity: Option<Capacity>,
    /// The form of the balance loss.
    pub balance: BalanceForm,
}

impl Routing {
    /// So many experts, `top_k` a token; softmax, gates renormalised, nothing dropped, Switch's form of the balance loss.
    #[must_use]
    pub fn new(experts: usize, top_k: usize) -> Self {
        Self {
            experts,
            top_k,
            renormalize: true,
            score: Score::Softmax,
            scale: 1.0,
            selection_bias: false,
            jitter: 0.0,
            capacity: None,
            balance: BalanceForm::Switch,
        }
    }

    /// Checks that the options make sense; layers do this when they are made.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no expert, `top_k` is not between 1 and their number, the scale or the capacity's factor is not a
    /// positive number, or the jitter is not in 0..1.
    pub fn check(&self) -> Result<()> {
        let Self {
            experts,
            top_k,
            scale,
            jitter,
            ..
        } = *self;
        if experts == 0 {
            return Err(Error::setting(
                "experts",
                experts,
                "there must be at least 1",
            ));
        }
        if top_k == 0 || top_k > experts {
            return Err(Error::setting(
                "top_k",
                top_k,
                format!("must be between 1 and the {experts} experts"),
            ));
        }
        if !(scale.is_normal() && scale > 0.0 && (1.0 / scale).is_normal()) {
            return Err(Error::setting("scale", scale, "must be a positive number"));
        }
        if !(0.0..1.0).contains(&jitter) {
            return Err(Error::setting(
                "jitter",
                jitter,
                "must be at least 0 and below 1",
            ));
        }
        if let Some(Capacity { factor, .. }) = self.capacity
            && !(factor.is_finite() && factor > 0.0)
        {
            return Err(Error::setting(
                "capacity factor",
                factor,
                "must be a positive number",
            ));
        }
        Ok(())
    }

    /// The most pairs that an expert takes of so many tokens; `None` if nothing is dropped.
    #[must_use]
    pub fn expert_capacity(&self, tokens: usize) -> Option<usize> {
        let Capacity { factor, .. } = self.capacity?;
        let share = factor * (tokens * self.top_k) as f64 / self.experts as f64;
        // 1.1 times 10 is 11.000000000000002 in f64: what only rounding puts above a whole number is that number.
        // An expert cannot be chosen more often than all choices there are.
        Some(((share * (1.0 - 1e-12)).ceil() as usize).clamp(1, tokens * self.top_k))
    }

    /// How many elements the router's parameters have, for inputs of this width.
    pub(crate) fn parameters(&self, width: usize) -> u64 {
        let bias = usize::from(self.selection_bias);
        self.experts as u64 * (width + bias) as u64
    }

    /// Sends every row of `input` (`[tokens, width]`) to its experts, with the parameters `NAME.router` `[experts, width]` (uniform in
    /// ±1/√width at the start) and, with a selection bias, `NAME.router_bias` `[experts]`.
    ///
    /// # Errors
    /// [`Error::Setting`] as [`Routing::check`], [`Error::Shape`] if the input is not a matrix.
    pub fn route(
        &self,
        graph: &mut Graph,
        name: &str,
        input: Value,
        trainable: bool,
    ) -> Result<RouterOutput> {
        self.check()?;
        // Rounded logits would send tokens elsewhere: nothing of a router is stored in 16 bits.
        graph.in_f32(|graph| self.route_in_f32(graph, name, input, trainable))
    }

    fn route_in_f32(
        &self,
        graph: &mut Graph,
        name: &str,
        input: Value,
        trainable: bool,
    ) -> Result<RouterOutput> {
        let (width, tokens) = {
            let shape = &graph.ty(input)?.shape;
            (shape.last(), shape.rows())
        };
        let router = graph.parameter(
            &format!("{name}.router"),
            [self.experts, width],
            kaiming(width),
            trainable,
        )?;
        let selection_bias = if self.selection_bias {
            let name = format!("{name}.router_bias");
            Some(graph.parameter(&name, [self.experts], Init::Zeros, false)?)
        } else {
            None
        };
        let input = self.jittered(graph, input)?;
        let logits = graph.matmul_nt(input, router)?;
        let route = Route {
            top_k: self.top_k,
            renormalize: self.renormalize,
            score: self.score,
            scale: self.scale,
        };
        let mut routed = graph.route_with(logits, selection_bias, route)?;
        let chosen = routed.segments;
        let capacity = self.expert_capacity(tokens);
        if let (Some(limit), Some(Capacity { drop, .. })) = (capacity, self.capacity) {
            routed = graph.limit_capacity(routed, self.experts, limit, drop)?;
        }
        Ok(RouterOutput {
            logits,
            routed,
            chosen,
            capacity,
            selection_bias,
            balance: self.balance,
        })
    }

    /// The one place where jitter meets the router's input.
    fn jittered(&self, graph: &mut Graph, input: Value) -> Result<Value> {
        if self.jitter > 0.0 && graph.is_training() {
            graph.jitter(input, self.jitter)
        } else {
            Ok(input)
        }
    }
}

/// Where a router sends the tokens.
#[derive(Clone, Copy, Debug)]
pub struct RouterOutput {
    /// The router's logits, `[tokens, experts]`: for the balance and z losses.
    pub logits: Value,
    /// Which experts each token takes, with which weights, after dropping: a dropped pair has the expert `experts` and the weight 0.
    pub routed: Routed,
    /// Which experts each token chose, before dropping.
    pub chosen: Segments,
    capacity: Option<usize>,
    selection_bias: Option<Value>,
    balance: BalanceForm,
}

impl RouterOutput {
    /// `balance_coefficient L_b + z_coefficient L_z`, to be added to the loss: without them nothing keeps the router from sending
    /// every token to the same expert. L_b is in the routing's form and counts choices before dropping.
    ///
    /// # Errors
    /// As [`Graph::balance_loss`] and [`Graph::z_loss`].
    pub fn auxiliary_loss(
        &self,
        graph: &mut Graph,
        balance_coefficient: f32,
        z_coefficient: f32,
    ) -> Result<Value> {
        let balance = graph
            .balance_loss_with(self.logits, self.chosen.experts(), self.balance)?
            .loss;
        let z = graph.z_loss(self.logits)?;
        let balance = graph.scale(balance, balance_coefficient)?;
        let z = graph.scale(z, z_coefficient)?;
        graph.add(balance, z)
    }

    /// Counts of choices and drops, and the router's entropy.
    ///
    /// # Errors
    /// As [`Graph::router_metrics`].
    pub fn metrics(&self, graph: &mut Graph) -> Result<RouterMetrics> {
        graph.router_metrics(self.logits, self.chosen, self.capacity)
    }

    /// After this run's choices, `b_e += rate * sign(mean count - count_e)` for the selection bias, in the same submission and outside
    /// the gradient (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, which takes 0.001). To be called after [`Graph::backward`], which
    /// reads the bias once more where the router is recomputed. Returns the updated parameter.
    ///
    /// # Errors
    /// [`Error::Setting`] if the routing has no selection bias or the rate is not finite.
    pub fn update_selection_bias(&self, graph: &mut Graph, rate: f32) -> Result<Value> {
        let bias = self.selection_bias.ok_or_else(|| {
            Error::setting(
                "selection_bias",
                false,
                "the router has no bias that could be updated",
            )
        })?;
        graph.update_selection_bias(bias, self.chosen, rate)
    }
}

/// What a routed layer gives: its output, and all that [`RouterOutput`] has.
#[derive(Clone, Copy, Debug)]
pub struct RoutedOutput {
    /// The output, `[tokens, d_out]`.
    pub output: Value,
    /// Where the tokens went.
    pub router: RouterOutput,
    /// What was rotated, by how much; `None` for layers without rotations.
    pub rotated: Option<RotatedLatents>,
}

/// The latents of the chosen experts and their rotations in a [`RotMole`](crate::layers::RotMole). A pair is a token and one of its
/// experts: row `token * top_k + slot`.
#[derive(Clone, Copy, Debug)]
pub struct RotatedLatents {
    /// The latents before the rotation, `[pairs, rank]`.
    pub before: Value,
    /// The latents after it.
    pub after: Value,
    /// The numbers of each rotation, bounded where the layer bounds them: `[pairs, numbers]`, or `[experts, numbers]` where each expert
    /// has one rotation for all tokens. For rotations made of planes they are angles.
    pub generator: Value,
}

impl RoutedOutput {
    pub(crate) fn new(output: Value, router: RouterOutput) -> Self {
        Self {
            output,
            router,
            rotated: None,
        }
    }
}

impl Deref for RoutedOutput {
    type Target = RouterOutput;

    fn deref(&self) -> &RouterOutput {
        &self.router
    }
}
