//! LoRA (Hu et al., arXiv 2106.09685): the baseline.

use crate::error::Result;
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::layers::{AdapterOptions, Linear};
use crate::ops::MatMul;

/// `y = x Wᵀ + s (x Aᵀ) Bᵀ`, with `NAME.lora_a` `[rank, d_in]` and `NAME.lora_b` `[d_out, rank]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// The layer underneath.
    pub base: Linear,
    /// Rank, scale and dropout.
    pub options: AdapterOptions,
}

impl Lora {
    /// LoRA on a linear layer.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if the rank is 0, alpha is not finite, or the dropout not in `0..1`.
    pub fn new(base: Linear, options: AdapterOptions) -> Result<Self> {
        options.check(&base)?;
        Ok(Self { base, options })
    }

    /// The output for `x` `[tokens, d_in]`. A starts uniform in ±1/√d_in, B at zero.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<Value> {
        let Linear {
            name, d_in, d_out, ..
        } = &self.base;
        let rank = self.options.rank;
        let base = self.base.forward(graph, x)?;
        let a = graph.parameter(
            &format!("{name}.lora_a"),
            [rank, *d_in],
            kaiming(*d_in),
            true,
        )?;
        let b = graph.parameter(&format!("{name}.lora_b"), [*d_out, rank], Init::Zeros, true)?;
        let adapted = self.options.adapter_input(graph, x)?;
        let z = graph.matmul_nt(adapted, a)?;
        let expand = MatMul {
            transpose_b: true,
            alpha: self.options.factor(),
            ..MatMul::default()
        };
        graph.matmul_with(z, b, expand, Some(base))
    }

    /// How many elements the adapter trains.
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.options.rank * (self.base.d_in + self.base.d_out)
    }
}
