//! The language model: embedding of the last bytes, two linear layers that can be adapted, RMS norm, a softmax over bytes.

use rankmix::layers::{
    AdapterOptions, CoMol, GateInput, Linear, Lora, MoeLora, RotMole, RoutedOutput, Routing,
};
use rankmix::ops::Rotation;
use rankmix::{Graph, Init, Result, TensorType, Value};

use crate::text::CONTEXT;

const BYTES: usize = 256;
const EMBEDDING: usize = 16;
/// Width of the input of the first layer, and of everything after it.
pub const WIDTH: usize = CONTEXT * EMBEDDING;
const BALANCE: f32 = 0.01;
const Z: f32 = 0.001;

/// What is added to the two linear layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Adapter {
    /// Nothing: the base itself is trained.
    None,
    Lora {
        rank: usize,
    },
    MoeLora {
        rank: usize,
        router: Routing,
    },
    RotMole {
        rank: usize,
        router: Routing,
        rotation: Rotation,
        gate_input: GateInput,
    },
    /// Core routing over all experts.
    CoMol {
        rank: usize,
        experts: usize,
    },
}

impl Adapter {
    pub fn name(&self) -> String {
        match self {
            Self::None => "base".to_owned(),
            Self::Lora { .. } => "LoRA".to_owned(),
            Self::MoeLora { .. } => "MoE-LoRA".to_owned(),
            Self::RotMole { rotation, .. } => format!("RotMoLE {rotation}"),
            Self::CoMol { .. } => "CoMoL".to_owned(),
        }
    }

    /// The name, with the rank where there is one.
    pub fn title(&self) -> String {
        match self.rank() {
            Some(rank) => format!("{}, rank {rank}", self.name()),
            None => self.name(),
        }
    }

    pub fn rank(&self) -> Option<usize> {
        match *self {
            Self::None => None,
            Self::Lora { rank }
            | Self::MoeLora { rank, .. }
            | Self::RotMole { rank, .. }
            | Self::CoMol { rank, .. } => Some(rank),
        }
    }

    pub fn experts(&self) -> Option<usize> {
        match self {
            Self::None | Self::Lora { .. } => None,
            Self::MoeLora { router, .. } | Self::RotMole { router, .. } => Some(router.experts),
            Self::CoMol { experts, .. } => Some(*experts),
        }
    }

    fn forward(
        &self,
        graph: &mut Graph,
        base: Linear,
        x: Value,
    ) -> Result<(Value, Option<RoutedOutput>)> {
        // The same factor in front of every adapter, whatever its rank.
        let options = |rank: usize| AdapterOptions::new(rank, 2.0 * rank as f32);
        let routed = match *self {
            Self::None => return Ok((base.trained().forward(graph, x)?, None)),
            Self::Lora { rank } => {
                return Ok((Lora::new(base, options(rank))?.forward(graph, x)?, None));
            }
            Self::MoeLora { rank, router } => {
                MoeLora::new(base, options(rank), router)?.forward(graph, x)?
            }
            Self::RotMole {
                rank,
                router,
                rotation,
                gate_input,
            } => RotMole::with_rotation(base, options(rank), router, rotation, gate_input)?
                .forward(graph, x)?,
            Self::CoMol { rank, experts } => {
                let layer = CoMol::new(base, options(rank), experts)?;
                // Every token takes every expert: there is no load to balance.
                return Ok((layer.forward(graph, x)?.output, None));
            }
        };
        Ok((routed.output, Some(routed)))
    }
}

/// The values of interest of a model in a graph.
pub struct Model {
    pub ids: Value,
    pub labels: Value,
    /// Mean cross-entropy of the next byte, in nats.
    pub loss: Value,
    /// The loss and the routers' auxiliary losses.
    pub training_loss: Value,
    /// The routed layers, in order.
    pub routed: Vec<RoutedOutput>,
}

/// Adds the model for so many tokens a run to a graph.
pub fn build(graph: &mut Graph, adapter: &Adapter, tokens: usize) -> Result<Model> {
    let base_is_trained = *adapter == Adapter::None;
    let ids = graph.input("ids", TensorType::i32([tokens, CONTEXT]))?;
    let labels = graph.input("labels", TensorType::i32([tokens]))?;
    let deviation = Init::Normal { deviation: 1.0 };
    let table = graph.parameter(
        "embedding.weight",
        [BYTES, EMBEDDING],
        deviation,
        base_is_trained,
    )?;
    let embedded = graph.embedding(table, ids)?;
    let mut x = graph.reshape(embedded, [tokens, WIDTH])?;
    let mut routed = Vec::new();
    for layer in ["layer1", "layer2"] {
        let (y, routing) = adapter.forward(graph, Linear::new(layer, WIDTH, WIDTH), x)?;
        routed.extend(routing);
        x = graph.silu(y)?;
    }
    let norm = graph.parameter("norm.weight", [WIDTH], Init::Ones, base_is_trained)?;
    let x = graph.rms_norm(x, norm, 1e-5)?;
    let head = Linear {
        trainable: base_is_trained,
        ..Linear::new("head", WIDTH, BYTES)
    };
    let logits = head.forward(graph, x)?;
    let loss = graph.cross_entropy(logits, labels)?;
    let mut training_loss = loss;
    for layer in &routed {
        let auxiliary = layer.auxiliary_loss(graph, BALANCE, Z)?;
        training_loss = graph.add(training_loss, auxiliary)?;
    }
    Ok(Model {
        ids,
        labels,
        loss,
        training_loss,
        routed,
    })
}
