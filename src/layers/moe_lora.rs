//! A mixture of LoRA experts with a top-k gate.

use crate::error::Result;
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::layers::{AdapterOptions, Linear, RoutedOutput, Routing};
use crate::ops::{Layout, Routed};

/// `y = x Wᵀ + s Σ_j g_j B_j A_j x` over the chosen experts j, with `NAME.lora_a` `[experts, rank, d_in]`, `NAME.lora_b`
/// `[experts, d_out, rank]` and `NAME.router` `[experts, d_in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeLora {
    /// The layer underneath.
    pub base: Linear,
    /// Rank and scale of each expert, and dropout.
    pub options: AdapterOptions,
    /// Experts and gate.
    pub routing: Routing,
}

/// The experts' latents, and what they are made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latents {
    /// What A reads.
    pub(crate) input: Value,
    /// The experts' A, `[experts, rank, d_in]`.
    pub(crate) a: Value,
    /// `[pairs, rank]`; not computed if nothing reads it.
    pub(crate) z: Value,
}

impl MoeLora {
    /// A mixture of LoRA experts on a linear layer.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if the rank is 0, alpha is not finite or the dropout not in `0..1`, and as
    /// [`Routing::check`].
    pub fn new(base: Linear, options: AdapterOptions, routing: Routing) -> Result<Self> {
        options.check(&base)?;
        routing.check()?;
        Ok(Self {
            base,
            options,
            routing,
        })
    }

    /// The output for `x` `[tokens, d_in]`. A and the router start uniform in ±1/√d_in, B at zero.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        self.forward_with(graph, x, |_, latents, _| Ok(latents.z))
    }

    /// The mixture, with something done to the experts' latents (`[pairs, rank]`) between A and B.
    pub(crate) fn forward_with(
        &self,
        graph: &mut Graph,
        x: Value,
        change: impl FnOnce(&mut Graph, Latents, &Routed) -> Result<Value>,
    ) -> Result<RoutedOutput> {
        let Linear {
            name, d_in, d_out, ..
        } = &self.base;
        let (rank, experts) = (self.options.rank, self.routing.experts);
        let base = self.base.forward(graph, x)?;
        let router = self.routing.route(graph, name, x, true)?;
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
        let routed = router.routed;
        let adapted = self.options.adapter_input(graph, x)?;
        let z = graph.shrink(adapted, a, Layout::OutIn, routed.segments)?;
        let z = change(
            graph,
            Latents {
                input: adapted,
                a,
                z,
            },
            &routed,
        )?;
        let output = graph.expand(
            z,
            b,
            Layout::OutIn,
            routed,
            self.options.factor(),
            Some(base),
        )?;
        Ok(RoutedOutput::new(output, router))
    }

    /// How many elements the adapter trains.
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.routing.experts
            * (self.options.rank * (self.base.d_in + self.base.d_out) + self.base.d_in)
    }
}
