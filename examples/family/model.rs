//! Two layers of one kind, each with a residual and an RMS norm, and a linear head.

use clap::ValueEnum;
use rankmix::layers::{
    AdapterOptions, CoMol, FeedForward, LatentMoe, Linear, Lora, Moe, MoeLora, RotMole,
    RouterOutput, Routing,
};
use rankmix::ops::{Rotation, RouterMetrics};
use rankmix::{Graph, Init, Result, Tensor, Value};

use crate::task::{CLASSES, WIDTH};

const RANK: usize = 8;
const INTERMEDIATE: usize = 64;
const LATENT: usize = 32;
const GROUPS: usize = 2;
const BALANCE: f32 = 0.01;
const Z: f32 = 0.001;
/// DeepSeek-V3's rate.
const BIAS_RATE: f32 = 0.001;

/// The layers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Kind {
    Lora,
    MoeLora,
    #[value(name = "rotmole")]
    RotMole,
    #[value(name = "comol")]
    CoMol,
    Moe,
    LatentMoe,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::MoeLora => "MoE-LoRA",
            Self::RotMole => "RotMoLE",
            Self::CoMol => "CoMoL",
            Self::Moe => "MoE",
            Self::LatentMoe => "latent MoE",
        }
    }
}

pub struct Model {
    pub kind: Kind,
    pub routing: Routing,
    pub rotation: Rotation,
    pub dropout: f32,
    pub recompute: bool,
}

pub struct Built {
    pub logits: Value,
    /// Balance and z losses of all routers; 0 where there are none.
    pub auxiliary_loss: Value,
    /// Of the last router, in a training graph.
    pub metrics: Option<RouterMetrics>,
    pub routers: Vec<RouterOutput>,
}

impl Model {
    pub fn build(&self, graph: &mut Graph, x: Value) -> Result<Built> {
        let mut hidden = x;
        let mut auxiliary_loss = graph.constant(Tensor::scalar(0.0))?;
        let mut metrics = None;
        let mut routers = Vec::new();
        for index in 0..2 {
            let name = format!("layers.{index}");
            let block = |graph: &mut Graph| self.block(graph, &name, hidden);
            let (output, router) = if self.recompute {
                graph.recompute(block)?
            } else {
                block(graph)?
            };
            hidden = output;
            let Some(router) = router else { continue };
            // A bias that balances the load takes the place of the balance loss.
            let balance = if self.routing.selection_bias {
                0.0
            } else {
                BALANCE
            };
            let auxiliary = router.auxiliary_loss(graph, balance, Z)?;
            auxiliary_loss = graph.add(auxiliary_loss, auxiliary)?;
            if graph.is_training() {
                let of_router = router.metrics(graph)?;
                metrics = Some(of_router);
            }
            routers.push(router);
        }
        if let Some(RouterMetrics {
            counts,
            dropped,
            entropy,
        }) = metrics
        {
            for value in [counts, dropped, entropy] {
                graph.output(value)?;
            }
        }
        let logits = Linear::new("head", WIDTH, CLASSES)
            .trained()
            .forward(graph, hidden)?;
        Ok(Built {
            logits,
            auxiliary_loss,
            metrics,
            routers,
        })
    }

    /// What changes a router outside the gradient; to be called after the backward pass.
    pub fn update_routers(&self, graph: &mut Graph, routers: &[RouterOutput]) -> Result<()> {
        if self.routing.selection_bias {
            for router in routers {
                router.update_selection_bias(graph, BIAS_RATE)?;
            }
        }
        Ok(())
    }

    /// `norm(x + layer(x))`.
    fn block(
        &self,
        graph: &mut Graph,
        name: &str,
        x: Value,
    ) -> Result<(Value, Option<RouterOutput>)> {
        let (output, router) = self.layer(graph, name, x)?;
        let sum = graph.add(output, x)?;
        let weight = graph.parameter(&format!("{name}.norm"), [WIDTH], Init::Ones, true)?;
        Ok((graph.rms_norm(sum, weight, 1e-5)?, router))
    }

    fn layer(
        &self,
        graph: &mut Graph,
        name: &str,
        x: Value,
    ) -> Result<(Value, Option<RouterOutput>)> {
        let base = || Linear::new(name, WIDTH, WIDTH);
        let options = AdapterOptions::new(RANK, 2.0 * RANK as f32).with_dropout(self.dropout);
        let expert = FeedForward::new(WIDTH, INTERMEDIATE);
        let routed = match self.kind {
            Kind::Lora => return Ok((Lora::new(base(), options)?.forward(graph, x)?, None)),
            Kind::MoeLora => MoeLora::new(base(), options, self.routing)?.forward(graph, x)?,
            Kind::RotMole => {
                let mut layer = RotMole::new(base(), options, self.routing)?;
                layer.rotation = self.rotation;
                layer.forward(graph, x)?
            }
            Kind::CoMol => {
                let layer = CoMol::new(base(), options, self.routing.experts)?
                    .with_sparse_gate(self.routing)?
                    .forward(graph, x)?;
                return Ok((layer.output, layer.router));
            }
            Kind::Moe => Moe::new(name, expert, self.routing)?.forward(graph, x)?,
            Kind::LatentMoe => {
                LatentMoe::new(name, expert, LATENT, GROUPS, self.routing)?.forward(graph, x)?
            }
        };
        Ok((routed.output, Some(routed.router)))
    }
}
