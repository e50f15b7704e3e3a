//! MoLE (arXiv 2503.23100): a mixture of feed-forward experts that work in latents shared by groups of experts.

use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::layers::feed_forward::{at_least_one, matrices, product};
use crate::layers::{FeedForward, RoutedOutput, RouterOutput, Routing, SharedExpert};
use crate::ops::{ActiveGroups, Layout, Projection, check_groups};

/// `y = Σ_j g_j E_j(x)` over the chosen experts, `E_i(x) = Wd_i (f(Ag_i (Bg x)) * (Au_i (Bu x)))` with Bg and Bu of the expert's group; with
/// `factored_down`, `Wd_i = Bd Ad_i` with Bd of the group (arXiv 2503.23100, section 3). Expert i of E is in group i / (E / G).
///
/// A token's latents are computed once for each of its active groups, never once for each expert.
///
/// Parameters, with hidden width n, intermediate width m, latent width l: `NAME.router` `[E, n]`, `NAME.gate_latent` `[G, l, n]` and
/// `NAME.gate_expert` `[E, m, l]` (if gated), `NAME.up_latent` and `NAME.up_expert` of the same shapes, `NAME.down` `[E, n, m]`, or with
/// `factored_down` `NAME.down_latent` `[G, n, l]` and `NAME.down_expert` `[E, l, m]`; those of [`Routing`] and [`SharedExpert`] where there
/// are any.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentMoe {
    /// The prefix of the parameters' names.
    pub name: String,
    /// The shape of each expert.
    pub expert: FeedForward,
    /// Width of the latents.
    pub latent: usize,
    /// Groups of experts that share their projections to the latents.
    pub groups: usize,
    /// Whether the down projections go through a latent of the group too.
    pub factored_down: bool,
    /// How tokens find their experts.
    pub routing: Routing,
    /// An expert that every token takes besides; its matrices are not factored.
    pub shared: Option<SharedExpert>,
    /// Whether the parameters are trained; they are unless this is changed.
    pub trainable: bool,
}

impl LatentMoe {
    /// A mixture of latent experts in so many groups, whose down projections are whole.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if a width is 0, the groups do not divide the experts, or as [`Routing::check`].
    pub fn new(
        name: impl Into<String>,
        expert: FeedForward,
        latent: usize,
        groups: usize,
        routing: Routing,
    ) -> Result<Self> {
        expert.check()?;
        routing.check()?;
        at_least_one("latent", latent)?;
        check_groups(routing.experts, groups)?;
        Ok(Self {
            name: name.into(),
            expert,
            latent,
            groups,
            factored_down: false,
            routing,
            shared: None,
            trainable: true,
        })
    }

    /// The same layer, its down projections factored too.
    #[must_use]
    pub fn with_factored_down(mut self) -> Self {
        self.factored_down = true;
        self
    }

    /// The same layer with a shared expert.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if its width is 0.
    pub fn with_shared(mut self, shared: SharedExpert) -> Result<Self> {
        self.shared = Some(shared);
        FeedForward::check_shared(self.shared)?;
        Ok(self)
    }

    /// The same layer, none of its parameters trained.
    #[must_use]
    pub fn frozen(mut self) -> Self {
        self.trainable = false;
        self
    }

    /// The output for `x` `[tokens, hidden]`. All matrices start uniform in ±1/√in. A token whose choices were all dropped gets zeros,
    /// or the shared expert's output alone.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, hidden]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        let (n, m, l) = (self.expert.hidden, self.expert.intermediate, self.latent);
        let (e, g) = (self.routing.experts, self.groups);
        let owner = (self.name.as_str(), self.trainable);
        let router = self.routing.route(graph, &self.name, x, self.trainable)?;
        let active = graph.active_groups(router.routed.segments, e, g)?;
        let mut projections = Vec::new();
        for part in ["gate", "up"] {
            if part == "up" || self.expert.gated {
                let latent = matrices(graph, owner, &format!("{part}_latent"), [g, l, n])?;
                let weight = matrices(graph, owner, &format!("{part}_expert"), [e, m, l])?;
                let x = graph.shrink(x, latent, Layout::OutIn, active.segments)?;
                projections.push(Projection { x, weight });
            }
        }
        let h = graph.gated_experts(
            self.expert.activation,
            projections[0],
            projections.get(1).copied(),
            router.routed.segments,
            Some(&active),
        )?;
        let mut output = if self.factored_down {
            self.down_through_latents(graph, h, &router, &active)?
        } else {
            let down = matrices(graph, owner, "down", [e, n, m])?;
            graph.expand(h, down, Layout::OutIn, router.routed, 1.0, None)?
        };
        if let Some(shared) = self.shared {
            output = self.expert.add_shared(graph, owner, shared, x, output)?;
        }
        Ok(RoutedOutput::new(output, router))
    }

    /// `Σ over the active groups of Bd (Σ over the group's chosen experts of g_j Ad_j h_j)`.
    fn down_through_latents(
        &self,
        graph: &mut Graph,
        h: Value,
        router: &RouterOutput,
        active: &ActiveGroups,
    ) -> Result<Value> {
        let (n, m, l) = (self.expert.hidden, self.expert.intermediate, self.latent);
        let (e, g) = (self.routing.experts, self.groups);
        let owner = (self.name.as_str(), self.trainable);
        let expert = matrices(graph, owner, "down_expert", [e, l, m])?;
        let latent = matrices(graph, owner, "down_latent", [g, n, l])?;
        let u = graph.shrink(h, expert, Layout::OutIn, router.routed.segments)?;
        let v = graph.combine(u, router.routed.gates, active)?;
        graph.expand_ungated(v, latent, Layout::OutIn, active.segments)
    }

    /// Parameters of the routed experts: E m n for down, 2 E m l for gate and up in their latents, 2 G l n for the projections to the
    /// latents. With `factored_down`, E m l + G l n in place of E m n; without a gate, half of the second and the third.
    #[must_use]
    pub fn expert_parameters(&self) -> u64 {
        let (n, m, l) = (self.expert.hidden, self.expert.intermediate, self.latent);
        let (e, g) = (self.routing.experts, self.groups);
        let down = if self.factored_down {
            product(&[e, m, l]) + product(&[g, l, n])
        } else {
            product(&[e, m, n])
        };
        let projections = self.expert.projections();
        down + product(&[projections, e, m, l]) + product(&[projections, g, l, n])
    }

    /// All parameters: those of the routed experts, E n of the router (and E of its bias), 3 s n of a shared expert of width s, 2 s n
    /// without a gate (and n of its sigmoid gate).
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.expert_parameters()
            + self.routing.parameters(self.expert.hidden)
            + self.expert.shared_elements(self.shared)
    }

    /// Floating-point operations of the routed experts for a token whose k choices fall into `active_groups` groups, forward, a
    /// multiply-add counting as 2: 2 k m n for down, 4 k m l for gate and up in their latents, 4 `active_groups` l n for the latents.
    /// With `factored_down`, 2 k m l + 2 `active_groups` l n in place of 2 k m n; without a gate, half of the second and the third.
    /// Activations and sums, of lower order, are not counted.
    #[must_use]
    pub fn expert_flops_per_token(&self, active_groups: usize) -> u64 {
        let (n, m, l) = (self.expert.hidden, self.expert.intermediate, self.latent);
        let k = self.routing.top_k;
        let down = if self.factored_down {
            product(&[2, k, m, l]) + product(&[2, active_groups, l, n])
        } else {
            product(&[2, k, m, n])
        };
        let projections = self.expert.projections();
        down + product(&[2, projections, k, m, l]) + product(&[2, projections, active_groups, l, n])
    }

    /// All floating-point operations for a token: those of the routed experts, 2 E n of the router, 6 s n of a shared expert, 4 s n
    /// without a gate (and 2 n of its sigmoid gate).
    #[must_use]
    pub fn flops_per_token(&self, active_groups: usize) -> u64 {
        self.expert_flops_per_token(active_groups)
            + product(&[2, self.routing.experts, self.expert.hidden])
            + 2 * self.expert.shared_elements(self.shared)
    }
}
