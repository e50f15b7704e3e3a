//! A mixture of feed-forward experts.

use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::layers::feed_forward::{matrices, product};
use crate::layers::{FeedForward, RoutedOutput, Routing, SharedExpert};
use crate::ops::{Layout, Projection};

/// `y = Σ_j g_j E_j(x)` over the chosen experts, `E_i(x) = Wd_i (f(Wg_i x) * (Wu_i x))` (Shazeer et al., arXiv 1701.06538; SwiGLU experts as in
/// Mixtral, arXiv 2401.04088).
///
/// Parameters, with E experts, hidden width n and intermediate width m: `NAME.router` `[E, n]`, `NAME.gate` `[E, m, n]` (if gated), `NAME.up`
/// `[E, m, n]`, `NAME.down` `[E, n, m]`; those of [`Routing`] and [`SharedExpert`] where there are any.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// The prefix of the parameters' names.
    pub name: String,
    /// The shape of each expert.
    pub expert: FeedForward,
    /// How tokens find their experts.
    pub routing: Routing,
    /// An expert that every token takes besides.
    pub shared: Option<SharedExpert>,
    /// Whether the parameters are trained; they are unless this is changed.
    pub trainable: bool,
}

impl Moe {
    /// A mixture of experts.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if a width is 0, or as [`Routing::check`].
    pub fn new(name: impl Into<String>, expert: FeedForward, routing: Routing) -> Result<Self> {
        expert.check()?;
        routing.check()?;
        Ok(Self {
            name: name.into(),
            expert,
            routing,
            shared: None,
            trainable: true,
        })
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
        let (e, n, m) = (
            self.routing.experts,
            self.expert.hidden,
            self.expert.intermediate,
        );
        let owner = (self.name.as_str(), self.trainable);
        let router = self.routing.route(graph, &self.name, x, self.trainable)?;
        let mut projections = Vec::new();
        for part in ["gate", "up"] {
            if part == "up" || self.expert.gated {
                let weight = matrices(graph, owner, part, [e, m, n])?;
                projections.push(Projection { x, weight });
            }
        }
        let h = graph.gated_experts(
            self.expert.activation,
            projections[0],
            projections.get(1).copied(),
            router.routed.segments,
            None,
        )?;
        let down = matrices(graph, owner, "down", [e, n, m])?;
        let mut output = graph.expand(h, down, Layout::OutIn, router.routed, 1.0, None)?;
        if let Some(shared) = self.shared {
            output = self.expert.add_shared(graph, owner, shared, x, output)?;
        }
        Ok(RoutedOutput::new(output, router))
    }

    /// Parameters of the routed experts: 3 E m n, for gate, up and down of every expert; 2 E m n without a gate.
    #[must_use]
    pub fn expert_parameters(&self) -> u64 {
        let matrices = self.expert.projections() + 1;
        product(&[
            matrices,
            self.routing.experts,
            self.expert.intermediate,
            self.expert.hidden,
        ])
    }

    /// All parameters: those of the routed experts, E n of the router (and E of its bias), 3 s n of a shared expert of width s, 2 s n
    /// without a gate (and n of its sigmoid gate).
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.expert_parameters()
            + self.routing.parameters(self.expert.hidden)
            + self.expert.shared_elements(self.shared)
    }

    /// Floating-point operations of the routed experts for a token, forward, a multiply-add counting as 2: 6 k m n, for gate, up and
    /// down of k experts; 4 k m n without a gate. Activations and sums, of lower order, are not counted.
    #[must_use]
    pub fn expert_flops_per_token(&self) -> u64 {
        let matrices = self.expert.projections() + 1;
        product(&[
            2,
            matrices,
            self.routing.top_k,
            self.expert.intermediate,
            self.expert.hidden,
        ])
    }

    /// All floating-point operations for a token: those of the routed experts, 2 E n of the router, 6 s n of a shared expert, 4 s n
    /// without a gate (and 2 n of its sigmoid gate).
    #[must_use]
    pub fn flops_per_token(&self) -> u64 {
        self.expert_flops_per_token()
            + product(&[2, self.routing.experts, self.expert.hidden])
            + 2 * self.expert.shared_elements(self.shared)
    }
}
