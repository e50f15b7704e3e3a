//! What MoE and latent MoE have in common: the shape of an expert, and the expert that every token takes.

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Value};
use crate::layers::linear::kaiming;
use crate::ops::{Activation, MatMul};

/// The shape of a feed-forward expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FeedForward {
    /// Width of the layer's input and output.
    pub hidden: usize,
    /// Width inside an expert.
    pub intermediate: usize,
    /// What an expert does in its middle.
    pub activation: Activation,
    /// An expert has a gate and an up projection, `down (activation(gate x) * (up x))`; if not, `down activation(up x)`.
    pub gated: bool,
}

impl FeedForward {
    /// SwiGLU experts.
    #[must_use]
    pub fn new(hidden: usize, intermediate: usize) -> Self {
        Self {
            hidden,
            intermediate,
            activation: Activation::Silu,
            gated: true,
        }
    }

    /// How many projections from the hidden width there are: gate and up, or up alone.
    pub(crate) fn projections(&self) -> usize {
        if self.gated { 2 } else { 1 }
    }

    pub(crate) fn check(&self) -> Result<()> {
        at_least_one("hidden", self.hidden)?;
        at_least_one("intermediate", self.intermediate)
    }

    pub(crate) fn check_shared(shared: Option<SharedExpert>) -> Result<()> {
        shared.map_or(Ok(()), |shared| {
            at_least_one("shared intermediate", shared.intermediate)
        })
    }

    /// Adds the output of the shared expert to `y`. Its parameters are `NAME.shared_gate` and `NAME.shared_up` `[intermediate, hidden]`,
    /// `NAME.shared_down` `[hidden, intermediate]`, and `NAME.shared_expert_gate` `[1, hidden]`.
    pub(crate) fn add_shared(
        &self,
        graph: &mut Graph,
        (name, trainable): (&str, bool),
        shared: SharedExpert,
        x: Value,
        y: Value,
    ) -> Result<Value> {
        let (n, s) = (self.hidden, shared.intermediate);
        let matrix = |graph: &mut Graph, part: &str, dims: [usize; 2]| {
            graph.parameter(&format!("{name}.{part}"), dims, kaiming(dims[1]), trainable)
        };
        let up = matrix(graph, "shared_up", [s, n])?;
        let up = graph.matmul_nt(x, up)?;
        let mut h = if self.gated {
            let gate = matrix(graph, "shared_gate", [s, n])?;
            let gate = graph.matmul_nt(x, gate)?;
            graph.activate(self.activation, gate, Some(up))?
        } else {
            graph.activate(self.activation, up, None)?
        };
        if shared.sigmoid_gate {
            let gate = matrix(graph, "shared_expert_gate", [1, n])?;
            let gate = graph.matmul_nt(x, gate)?;
            let gate = graph.sigmoid(gate)?;
            h = graph.mul(h, gate)?;
        }
        let down = matrix(graph, "shared_down", [n, s])?;
        let product = MatMul {
            transpose_b: true,
            ..MatMul::default()
        };
        graph.matmul_with(h, down, product, Some(y))
    }

    /// Parameters and multiply-adds of the shared expert for a token: they are equal.
    pub(crate) fn shared_elements(&self, shared: Option<SharedExpert>) -> u64 {
        shared.map_or(0, |shared| {
            let matrices = self.projections() + 1;
            let gate = if shared.sigmoid_gate { self.hidden } else { 0 };
            product(&[matrices, shared.intermediate, self.hidden]) + gate as u64
        })
    }
}

/// An expert that every token takes, beside those it is routed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedExpert {
    /// Its width inside. Several shared experts of one width are one of their widths together.
    pub intermediate: usize,
    /// Its output is multiplied by `sigmoid(w x)` (Qwen2's `shared_expert_gate`).
    pub sigmoid_gate: bool,
}

/// An expert's matrices, `[count, out, in]`, uniform in ±1/√in at the start.
pub(crate) fn matrices(
    graph: &mut Graph,
    (layer, trainable): (&str, bool),
    part: &str,
    dims: [usize; 3],
) -> Result<Value> {
    let init: Init = kaiming(dims[2]);
    graph.parameter(&format!("{layer}.{part}"), dims, init, trainable)
}

pub(crate) fn at_least_one(name: &'static str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::setting(name, value, "must be at least 1"));
    }
    Ok(())
}

/// Of counts that are each below 2^32 and few: exact.
pub(crate) fn product(factors: &[usize]) -> u64 {
    factors.iter().map(|&factor| factor as u64).product()
}
