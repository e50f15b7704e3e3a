//! A linear layer.

use crate::error::Result;
use crate::graph::{Graph, Init, Value};

/// `y = x Wᵀ`, with `W` `[d_out, d_in]` named `NAME.weight`. What adapters stand on.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The prefix of the parameter's name.
    pub name: String,
    /// Width of the input.
    pub d_in: usize,
    /// Width of the output.
    pub d_out: usize,
    /// Whether the weight is trained. Under an adapter it is not.
    pub trainable: bool,
}

impl Linear {
    /// A frozen linear layer.
    pub fn new(name: impl Into<String>, d_in: usize, d_out: usize) -> Self {
        Self {
            name: name.into(),
            d_in,
            d_out,
            trainable: false,
        }
    }

    /// The same layer, its weight trained.
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

    /// `x Wᵀ` for `x` `[tokens, d_in]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<Value> {
        let weight = self.weight(graph)?;
        graph.matmul_nt(x, weight)
    }
}

/// Kaiming's uniform start with a = √5, as PyTorch's linear layers have it.
pub(crate) fn kaiming(d_in: usize) -> Init {
    Init::Uniform {
        bound: 1.0 / (d_in.max(1) as f32).sqrt(),
    }
}
