//! A mixture of LoRA experts with a top-k gate.

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::layers::{AdapterOptions, Linear};
use crate::ops::{Layout, Routed};

/// How tokens find their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RouterOptions {
    /// How many experts there are.
    pub experts: usize,
    /// How many of them each token takes.
    pub top_k: usize,
    /// The gates are the softmax over the chosen experts; if not, their part of the softmax over all.
    pub renormalize: bool,
}

impl RouterOptions {
    /// So many experts, `top_k` a token, gates renormalised.
    #[must_use]
    pub fn new(experts: usize, top_k: usize) -> Self {
        Self {
            experts,
            top_k,
            renormalize: true,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let Self { experts, top_k, .. } = *self;
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
        Ok(())
    }
}

/// What a routed layer gives.
#[derive(Clone, Copy, Debug)]
pub struct RoutedOutput {
    /// The output, `[tokens, d_out]`.
    pub output: Value,
    /// The router's logits, `[tokens, experts]`: for the balance and z losses.
    pub logits: Value,
    /// Which experts each token took, with which weights.
    pub routed: Routed,
}

impl RoutedOutput {
    /// `balance_coefficient L_b + z_coefficient L_z`, to be added to the loss: without them nothing keeps the router from sending
    /// every token to the same expert.
    ///
    /// # Errors
    /// As [`Graph::balance_loss`] and [`Graph::z_loss`].
    pub fn auxiliary_loss(
        &self,
        graph: &mut Graph,
        balance_coefficient: f32,
        z_coefficient: f32,
    ) -> Result<Value> {
        let balance = graph.balance_loss(self.logits, self.routed.experts())?.loss;
        let z = graph.z_loss(self.logits)?;
        let balance = graph.scale(balance, balance_coefficient)?;
        let z = graph.scale(z, z_coefficient)?;
        graph.add(balance, z)
    }
}

/// `y = x Wᵀ + s Σ_j g_j B_j A_j x` over the chosen experts j, with `NAME.lora_a` `[experts, rank, d_in]`, `NAME.lora_b`
/// `[experts, d_out, rank]` and `NAME.router` `[experts, d_in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeLora {
    /// The layer underneath.
    pub base: Linear,
    /// Rank and scale of each expert, and dropout.
    pub options: AdapterOptions,
    /// Experts and gate.
    pub router: RouterOptions,
}

impl MoeLora {
    /// A mixture of LoRA experts on a linear layer.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rank or the number of experts is 0, alpha is not finite, the dropout not in `0..1`, or `top_k` not
    /// between 1 and the number of experts.
    pub fn new(base: Linear, options: AdapterOptions, router: RouterOptions) -> Result<Self> {
        options.check(&base)?;
        router.check()?;
        Ok(Self {
            base,
            options,
            router,
        })
    }

    /// The output for `x` `[tokens, d_in]`. A and the router start uniform in ±1/√d_in, B at zero.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        self.forward_with(graph, x, |_, z, _| Ok(z))
    }

    /// The mixture, with something done to the experts' latents (`[pairs, rank]`) between A and B.
    pub(crate) fn forward_with(
        &self,
        graph: &mut Graph,
        x: Value,
        latents: impl FnOnce(&mut Graph, Value, &Routed) -> Result<Value>,
    ) -> Result<RoutedOutput> {
        let Linear {
            name, d_in, d_out, ..
        } = &self.base;
        let (
            rank,
            RouterOptions {
                experts,
                top_k,
                renormalize,
            },
        ) = (self.options.rank, self.router);
        let base = self.base.forward(graph, x)?;
        let a = graph.parameter(
            &format!("{name}.lora_a"),
            [experts, rank, *d_in],
            kaiming(*d_in),
            true,
        )?;
        let b = graph.parameter(
            &format!("{name}.lora_b"),
            [experts, *d_out, rank],
            Init::Zeros,
            true,
        )?;
        let (logits, routed) = graph.in_f32(|graph| {
            let router = graph.parameter(
                &format!("{name}.router"),
                [experts, *d_in],
                kaiming(*d_in),
                true,
            )?;
            let logits = graph.matmul_nt(x, router)?;
            Ok::<_, Error>((logits, graph.route(logits, top_k, renormalize)?))
        })?;
        let adapted = self.options.adapter_input(graph, x)?;
        let z = graph.shrink(adapted, a, Layout::OutIn, routed.segments)?;
        let z = latents(graph, z, &routed)?;
        let output = graph.expand(
            z,
            b,
            Layout::OutIn,
            routed,
            self.options.factor(),
            Some(base),
        )?;
        Ok(RoutedOutput {
            output,
            logits,
            routed,
        })
    }

    /// How many elements the adapter trains.
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.router.experts
            * (self.options.rank * (self.base.d_in + self.base.d_out) + self.base.d_in)
    }
}
