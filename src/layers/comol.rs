//! CoMoL (arXiv 2603.00573): experts in the core space of one shared pair of LoRA matrices, merged for each token.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::layers::{AdapterOptions, Linear, RoutedOutput, RouterOutput, Routing};
use crate::ops::{CoreMix, MatMul};

/// What CoMoL's router looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreRouting {
    /// The latent `A x`, `[tokens, rank]`, in training that of the dropped-out `x`: core routing, a router of `experts * rank`
    /// numbers.
    #[default]
    Core,
    /// The layer's input, `[tokens, d_in]`: raw routing.
    Raw,
}

/// `y = x Wᵀ + s B Cᵀ A x` with `C = Σ_e g_e M_e`: the experts are small matrices between one shared A and B, and each token has a
/// merged one of its own. Parameters `NAME.lora_a` `[rank, d_in]`, `NAME.lora_b` `[d_out, rank]`, `NAME.core` `[experts, rank, rank]`,
/// `NAME.router` `[experts, rank or d_in]`.
///
/// The gates are the softmax over all experts, or with [`CoMol::with_top_k`] over the chosen ones; [`CoMol::with_sparse_gate`] takes all the
/// options that routing has.
///
/// ```
/// use rankmix::layers::{AdapterOptions, CoMol, Linear};
///
/// # fn main() -> rankmix::Result<()> {
/// // Queries, keys and values read the same input: they can share A. Keys and values are equally wide: they can share B.
/// let options = AdapterOptions::new(16, 16.0);
/// let adapted = |name, d_out| CoMol::new(Linear::new(name, 4096, d_out), options, 8);
/// let q = adapted("q_proj", 4096)?.sharing_a("attention");
/// let k = adapted("k_proj", 1024)?.sharing_a("attention").sharing_b("key_value");
/// let v = adapted("v_proj", 1024)?.sharing_a("attention").sharing_b("key_value");
/// let apart = q.trainable_elements() + k.trainable_elements() + v.trainable_elements();
/// let shared = CoMol::trainable_elements_of(&[q, k, v]);
/// assert_eq!(apart - shared, 16 * (2 * 4096 + 1024));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CoMol {
    /// The layer underneath.
    pub base: Linear,
    /// Rank, scale and dropout.
    pub options: AdapterOptions,
    /// How many core matrices there are.
    pub experts: usize,
    /// What the router looks at.
    pub routing: CoreRouting,
    /// How each token finds the experts it takes; `None`: it takes all, and the gates are the softmax.
    pub sparse: Option<Routing>,
    /// In which order the merge is summed.
    pub mix: CoreMix,
    /// The prefix of A's name, if it is not the layer's own.
    pub shared_a: Option<String>,
    /// The prefix of B's name, if it is not the layer's own.
    pub shared_b: Option<String>,
}

/// What a CoMoL layer gives.
#[derive(Clone, Copy, Debug)]
pub struct CoMolOutput {
    /// The output, `[tokens, d_out]`.
    pub output: Value,
    /// The router's logits, `[tokens, experts]`.
    pub logits: Value,
    /// The weights of the experts, `[tokens, experts]`, or `[tokens, top_k]` for the chosen ones.
    pub gates: Value,
    /// Where the router sent the tokens; `None` if each took all experts.
    pub router: Option<RouterOutput>,
}

impl CoMolOutput {
    /// The output as that of other routed layers; `None` if every token took every expert.
    #[must_use]
    pub fn routed_output(&self) -> Option<RoutedOutput> {
        let output = self.output;
        self.router.map(|router| RoutedOutput::new(output, router))
    }

    /// `balance_coefficient L_b + z_coefficient L_z`, to be added to the loss. A dense gate has no choices that could be out of
    /// balance: there only the z loss exists.
    ///
    /// # Errors
    /// [`Error::Setting`] if the balance coefficient is not 0 under a dense gate; and as [`Graph::balance_loss`] and
    /// [`Graph::z_loss`].
    pub fn auxiliary_loss(
        &self,
        graph: &mut Graph,
        balance_coefficient: f32,
        z_coefficient: f32,
    ) -> Result<Value> {
        if let Some(routed) = self.routed_output() {
            return routed.auxiliary_loss(graph, balance_coefficient, z_coefficient);
        }
        if balance_coefficient != 0.0 {
            return Err(Error::setting(
                "balance_coefficient",
                balance_coefficient,
                "a dense gate sends every token to every expert: there is no load to balance, and it must be 0",
            ));
        }
        let z = graph.z_loss(self.logits)?;
        graph.scale(z, z_coefficient)
    }
}

impl CoMol {
    /// CoMoL on a linear layer, with core routing, a dense gate, and parameters of its own.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rank or the number of experts is 0, alpha is not finite, or the dropout not in `0..1`.
    pub fn new(base: Linear, options: AdapterOptions, experts: usize) -> Result<Self> {
        options.check(&base)?;
        if experts == 0 {
            return Err(Error::setting(
                "experts",
                experts,
                "there must be at least 1",
            ));
        }
        Ok(Self {
            base,
            options,
            experts,
            routing: CoreRouting::default(),
            sparse: None,
            mix: CoreMix::default(),
            shared_a: None,
            shared_b: None,
        })
    }

    /// The same layer, its router looking at the latent or at the layer's input.
    #[must_use]
    pub fn with_routing(mut self, routing: CoreRouting) -> Self {
        self.routing = routing;
        self
    }

    /// The same layer, each token taking the `top_k` experts with the largest logits.
    ///
    /// # Errors
    /// [`Error::Setting`] if `top_k` is not between 1 and the number of experts.
    pub fn with_top_k(self, top_k: usize) -> Result<Self> {
        let routing = Routing::new(self.experts, top_k);
        self.with_sparse_gate(routing)
    }

    /// The same layer, each token taking the experts that `routing` finds for it.
    ///
    /// # Errors
    /// [`Error::Setting`] if `routing` has another number of experts, and as [`Routing::check`].
    pub fn with_sparse_gate(mut self, routing: Routing) -> Result<Self> {
        routing.check()?;
        if routing.experts != self.experts {
            return Err(Error::setting(
                "experts",
                routing.experts,
                format!("the layer has {} core matrices", self.experts),
            ));
        }
        self.sparse = Some(routing);
        Ok(self)
    }

    /// The same layer, with the order in which the merge is summed given.
    #[must_use]
    pub fn with_mix(mut self, mix: CoreMix) -> Self {
        self.mix = mix;
        self
    }

    /// The same layer with both A and B shared with every other layer that names the same: they are `SHARED.lora_a` and
    /// `SHARED.lora_b`. The core and the router stay the layer's own. Ranks and widths must be equal; where only the inputs' are,
    /// there is [`CoMol::sharing_a`].
    #[must_use]
    pub fn sharing(self, shared: &str) -> Self {
        self.sharing_a(shared).sharing_b(shared)
    }

    /// The same layer with A shared, as `SHARED.lora_a`: for layers of equal rank and input width.
    #[must_use]
    pub fn sharing_a(mut self, shared: &str) -> Self {
        self.shared_a = Some(shared.to_owned());
        self
    }

    /// The same layer with B shared, as `SHARED.lora_b`: for layers of equal rank and output width.
    #[must_use]
    pub fn sharing_b(mut self, shared: &str) -> Self {
        self.shared_b = Some(shared.to_owned());
        self
    }

    fn a_name(&self) -> String {
        let prefix = self.shared_a.as_ref().unwrap_or(&self.base.name);
        format!("{prefix}.lora_a")
    }

    fn b_name(&self) -> String {
        let prefix = self.shared_b.as_ref().unwrap_or(&self.base.name);
        format!("{prefix}.lora_b")
    }

    fn router_width(&self) -> usize {
        match self.routing {
            CoreRouting::Core => self.options.rank,
            CoreRouting::Raw => self.base.d_in,
        }
    }

    /// The output for `x` `[tokens, d_in]`. A, the core and the router start uniform in ±1/√width (Kaiming, a = √5), width being
    /// that of what they read; B starts at zero.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `[tokens, d_in]`, [`Error::DuplicateName`] if A or B is shared with a layer of other widths
    /// or another rank, [`Error::Setting`] if the sparse gate was changed to one that makes no sense.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<CoMolOutput> {
        let Linear {
            name, d_in, d_out, ..
        } = &self.base;
        let (rank, experts) = (self.options.rank, self.experts);
        let base = self.base.forward(graph, x)?;
        let adapted = self.options.adapter_input(graph, x)?;
        let latent = |graph: &mut Graph| {
            let a = graph.parameter(&self.a_name(), [rank, *d_in], kaiming(*d_in), true)?;
            graph.matmul_nt(adapted, a)
        };
        // With core routing A x is what the router looks at: see `Routing::route`.
        let z = match self.routing {
            CoreRouting::Core => graph.in_f32(latent)?,
            CoreRouting::Raw => latent(graph)?,
        };
        let b = graph.parameter(&self.b_name(), [*d_out, rank], Init::Zeros, true)?;
        let core = graph.parameter(
            &format!("{name}.core"),
            [experts, rank, rank],
            kaiming(rank),
            true,
        )?;
        let routed_by = match self.routing {
            CoreRouting::Core => z,
            CoreRouting::Raw => x,
        };
        let (logits, gates, router, mixed) = match self.sparse {
            Some(routing) => {
                let router = routing.route(graph, name, routed_by, true)?;
                let mixed = graph.mix_routed_cores(z, core, router.routed, self.mix)?;
                (router.logits, router.routed.gates, Some(router), mixed)
            }
            None => {
                let width = self.router_width();
                let router = graph.in_f32(|graph| {
                    let name = format!("{name}.router");
                    graph.parameter(&name, [experts, width], kaiming(width), true)
                })?;
                let [logits, gates, mixed] = match self.routing {
                    CoreRouting::Core => graph.soft_merge(z, core, router, self.mix)?,
                    CoreRouting::Raw => {
                        let (logits, gates) = graph.in_f32(|graph| {
                            let logits = graph.matmul_nt(x, router)?;
                            Ok::<_, Error>((logits, graph.softmax(logits)?))
                        })?;
                        [logits, gates, graph.mix_cores(z, core, gates, self.mix)?]
                    }
                };
                (logits, gates, None, mixed)
            }
        };
        let expand = MatMul {
            transpose_b: true,
            alpha: self.options.factor(),
            ..MatMul::default()
        };
        let output = graph.matmul_with(mixed, b, expand, Some(base))?;
        Ok(CoMolOutput {
            output,
            logits,
            gates,
            router,
        })
    }

    /// How many elements the adapter trains, A and B included even if they are shared:
    /// `rank (d_in + d_out) + experts rank² + experts rank` (with raw routing `experts d_in`).
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.a_elements() + self.b_elements() + self.own_elements()
    }

    /// How many elements several adapters train together, each shared A and B counted once.
    #[must_use]
    pub fn trainable_elements_of(layers: &[Self]) -> usize {
        let mut counted = BTreeSet::new();
        let mut total = 0;
        for layer in layers {
            total += layer.own_elements();
            if counted.insert(layer.a_name()) {
                total += layer.a_elements();
            }
            if counted.insert(layer.b_name()) {
                total += layer.b_elements();
            }
        }
        total
    }

    fn a_elements(&self) -> usize {
        self.options.rank * self.base.d_in
    }

    fn b_elements(&self) -> usize {
        self.options.rank * self.base.d_out
    }

    /// Core and router.
    fn own_elements(&self) -> usize {
        self.experts * (self.options.rank * self.options.rank + self.router_width())
    }
}

/// The widths of a decoder-only transformer, as far as adapters on it are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecoderWidths {
    /// How many layers it has.
    pub layers: usize,
    /// The width of the hidden state.
    pub hidden: usize,
    /// The width of the queries: heads times the width of a head.
    pub query: usize,
    /// The width of the keys, and that of the values: smaller than the queries' with grouped-query attention.
    pub key_value: usize,
    /// The width inside the feed-forward part.
    pub intermediate: usize,
}

impl DecoderWidths {
    /// The projections that the CoMoL paper adapts, for one layer: query, key, value, attention output, and feed-forward down.
    #[must_use]
    pub fn adapted(&self, layer: usize) -> [Linear; 5] {
        let attention = format!("model.layers.{layer}.self_attn");
        let down = format!("model.layers.{layer}.mlp.down_proj");
        [
            Linear::new(format!("{attention}.q_proj"), self.hidden, self.query),
            Linear::new(format!("{attention}.k_proj"), self.hidden, self.key_value),
            Linear::new(format!("{attention}.v_proj"), self.hidden, self.key_value),
            Linear::new(format!("{attention}.o_proj"), self.query, self.hidden),
            Linear::new(down, self.intermediate, self.hidden),
        ]
    }

    /// CoMoL on those projections of every layer.
    ///
    /// # Errors
    /// As [`CoMol::new`].
    pub fn comol(&self, options: AdapterOptions, experts: usize) -> Result<Vec<CoMol>> {
        (0..self.layers)
            .flat_map(|layer| self.adapted(layer))
            .map(|base| CoMol::new(base, options, experts))
            .collect()
    }
}
