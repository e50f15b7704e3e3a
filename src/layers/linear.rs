//! A linear layer.

use crate::error::Result;
use crate::graph::{Graph, Init, Value};
use crate::ops::Product;

/// `y = x Wᵀ + b`, with `W` `[d_out, d_in]` named `NAME.weight`, and `b` `[d_out]` named `NAME.bias` if there is one. What adapters stand on.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The prefix of the parameter's name.
    pub name: String,
    /// Width of the input.
    pub d_in: usize,
    /// Width of the output.
    pub d_out: usize,
    /// Whether the weight, and the bias, are trained. Under an adapter they are not.
    pub trainable: bool,
    /// Whether there is a bias.
    pub bias: bool,
}

impl Linear {
    /// A frozen linear layer without a bias.
    pub fn new(name: impl Into<String>, d_in: usize, d_out: usize) -> Self {
        Self {
            name: name.into(),
            d_in,
            d_out,
            trainable: false,
            bias: false,
        }
    }

    /// The same layer with a bias.
    #[must_use]
    pub fn with_bias(mut self) -> Self {
        self.bias = true;
        self
    }

    /// The same layer, its weight and bias trained.
    #[must_use]
    pub fn trained(mut self) -> Self {
        self.trainable = true;
        self
    }

    /// The weight, `[d_out, d_in]`. It starts uniform in ±1/√d_in (Kaiming, a = √5).
    ///
    /// # Errors
    /// [`Error::DuplicateName`](crate::Error::DuplicateName) if the name is taken by something else.
    pub fn weight(&self, graph: &mut Graph) -> Result<Value> {
        let init = kaiming(self.d_in);
        graph.parameter(
            &format!("{}.weight", self.name),
            [self.d_out, self.d_in],
            init,
            self.trainable,
        )
    }

    /// `x Wᵀ + b` for `x` `[tokens, d_in]`. The bias starts as the weight does, uniform in ±1/√d_in.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<Value> {
        let weight = self.weight(graph)?;
        if !self.bias {
            return graph.matmul_nt(x, weight);
        }
        let name = format!("{}.bias", self.name);
        let init = kaiming(self.d_in);
        let bias = graph.parameter(&name, [self.d_out], init, self.trainable)?;
        graph.matmul_bias(Product::nt(x, weight), bias)
    }
}

/// Kaiming's uniform start with a = √5, as PyTorch's linear layers have it.
pub(crate) fn kaiming(d_in: usize) -> Init {
    Init::Uniform {
        bound: 1.0 / (d_in.max(1) as f32).sqrt(),
    }
}
