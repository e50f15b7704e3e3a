//! The memory of a layer's training step against the least that any plan could do with, for the sizes of `rankmix time`.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{
    AdapterOptions, CoMol, FeedForward, GateInput, LatentMoe, Linear, Lora, Moe, MoeLora, RotMole,
    Routing,
};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, ParameterStore, TensorType, Value};

use crate::devices;

const LAYERS: [&str; 6] = ["lora", "moe_lora", "rotmole", "comol", "moe", "latent_moe"];

fn output(layer: &str, graph: &mut Graph, x: Value) -> rankmix::Result<Value> {
    let base = Linear::new("layer", 1024, 1024);
    let adapter = AdapterOptions::new(16, 32.0);
    let router = Routing::new(8, 2);
    let expert = FeedForward::new(512, 256);
    Ok(match layer {
        "lora" => Lora::new(base, adapter)?.forward(graph, x)?,
        "moe_lora" => {
            MoeLora::new(base, adapter, router)?
                .forward(graph, x)?
                .output
        }
        "rotmole" => {
            let gate = GateInput::Input;
            let layer = RotMole::with_rotation(base, adapter, router, Rotation::Planes, gate)?;
            layer.forward(graph, x)?.output
        }
        "comol" => CoMol::new(base, adapter, 8)?.forward(graph, x)?.output,
        "moe" => Moe::new("layer", expert, router)?.forward(graph, x)?.output,
        _ => {
            let layer = LatentMoe::new("layer", expert, 256, 2, router)?;
            layer.forward(graph, x)?.output
        }
    })
}

fn pools_are_near_their_lower_bounds(device: &Device) -> Result<(), Failed> {
    let mut far = Vec::new();
    for layer in LAYERS {
        let (tokens, width) = match layer {
            "moe" | "latent_moe" => (256, 512),
            _ => (512, 1024),
        };
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([tokens, width]))?;
        let y = output(layer, &mut graph, x)?;
        let upstream = graph.input("upstream", TensorType::f32([tokens, width]))?;
        let wanted: Vec<Value> = std::iter::once(x).chain(graph.trainable()).collect();
        for gradient in graph.gradients_from(&[(y, upstream)], &wanted)? {
            graph.output(gradient)?;
        }
        graph.output(y)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 0)?;
        let memory = graph.compile(&store)?.memory();
        let ratio = memory.pool as f64 / memory.pool_lower_bound as f64;
        println!(
            "{layer}: pool {} bytes, {ratio:.4} of the lower bound",
            memory.pool
        );
        if !(1.0..=1.05).contains(&ratio) {
            far.push(format!(
                "{layer}: {ratio:.4} times the lower bound, {memory:?}"
            ));
        }
    }
    if far.is_empty() {
        Ok(())
    } else {
        Err(far.join("; ").into())
    }
}

pub fn trials() -> Vec<Trial> {
    devices::own_trials(
        "memory::pools_are_near_their_lower_bounds",
        pools_are_near_their_lower_bounds,
    )
}
