//! Every layer with every training option at once: dropout or jitter, a capacity, a selection bias, recomputation, micro-batches, both
//! storages and a scaled loss. Reruns are equal bit for bit, and recomputing changes nothing.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{
    AdapterOptions, Capacity, CoMol, FeedForward, LatentMoe, Linear, Lora, Moe, MoeLora, RotMole,
    RouterOutput, Routing,
};
use rankmix::ops::{DropPolicy, Score};
use rankmix::train::{Accumulated, AdamW, GradientAccumulation, LossScaling};
use rankmix::{Device, Graph, ParameterStore, Precision, Result, Tensor, TensorType, Value};

use crate::case::{floats, ints};
use crate::devices;

const TOKENS: usize = 29;
const WIDTH: usize = 12;

type Forward = fn(&mut Graph, Linear, Value) -> Result<(Value, Option<RouterOutput>)>;

fn options() -> AdapterOptions {
    AdapterOptions::new(4, 8.0).with_dropout(0.25)
}

fn routing() -> Routing {
    Routing {
        score: Score::Sigmoid,
        selection_bias: true,
        jitter: 0.2,
        capacity: Some(Capacity {
            factor: 1.0,
            drop: DropPolicy::Gate,
        }),
        ..Routing::new(4, 2)
    }
}

const LAYERS: [(&str, Forward); 7] = [
    ("lora", |graph, base, x| {
        Ok((Lora::new(base, options())?.forward(graph, x)?, None))
    }),
    ("moe_lora", |graph, base, x| {
        let routed = MoeLora::new(base, options(), routing())?.forward(graph, x)?;
        Ok((routed.output, Some(routed.router)))
    }),
    ("rotmole", |graph, base, x| {
        let routed = RotMole::new(base, options(), routing())?.forward(graph, x)?;
        Ok((routed.output, Some(routed.router)))
    }),
    ("comol", |graph, base, x| {
        let layer = CoMol::new(base, options(), 4)?.forward(graph, x)?;
        Ok((layer.output, None))
    }),
    ("comol_sparse", |graph, base, x| {
        let layer = CoMol::new(base, options(), 4)?.with_sparse_gate(routing())?;
        let output = layer.forward(graph, x)?;
        Ok((output.output, output.router))
    }),
    ("moe", |graph, base, x| {
        let expert = FeedForward::new(WIDTH, 10);
        let routed = Moe::new(base.name, expert, routing())?.forward(graph, x)?;
        Ok((routed.output, Some(routed.router)))
    }),
    ("latent_moe", |graph, base, x| {
        let expert = FeedForward::new(WIDTH, 10);
        let layer = LatentMoe::new(base.name, expert, 6, 2, routing())?.with_factored_down();
        let routed = layer.forward(graph, x)?;
        Ok((routed.output, Some(routed.router)))
    }),
];

#[derive(Clone, Copy)]
struct Setting {
    precision: Precision,
    recompute: bool,
    training: bool,
    seed: u32,
}

/// A step over a micro-batch, which accumulates its gradients.
struct Step {
    graph: Graph,
    inputs: [Value; 2],
    loss: Value,
    accumulated: Accumulated,
}

fn step(forward: Forward, setting: Setting) -> Result<Step> {
    let mut graph = Graph::new();
    graph.set_training(setting.training);
    graph.set_precision(setting.precision);
    let x = graph.input("x", TensorType::f32([TOKENS, WIDTH]))?;
    let labels = graph.input("labels", TensorType::i32([TOKENS]))?;
    let mut hidden = x;
    let mut loss = graph.constant(Tensor::scalar(0.0))?;
    let mut routers = Vec::new();
    for index in 0..2 {
        let base = Linear::new(format!("layers.{index}"), WIDTH, WIDTH);
        let block = |graph: &mut Graph| {
            let (output, router) = forward(graph, base, hidden)?;
            Ok((graph.add(output, hidden)?, router))
        };
        let (output, router) = if setting.recompute {
            graph.recompute(block)?
        } else {
            block(&mut graph)?
        };
        hidden = output;
        routers.extend(router);
    }
    for router in &routers {
        let auxiliary = router.auxiliary_loss(&mut graph, 0.01, 0.001)?;
        loss = graph.add(loss, auxiliary)?;
    }
    let task = graph.cross_entropy(hidden, labels)?;
    let loss = graph.add(loss, task)?;
    graph.output(loss)?;
    let gradients = graph.backward_scaled(loss, LossScaling::default())?;
    for router in &routers {
        router.update_selection_bias(&mut graph, 0.01)?;
    }
    let accumulated = GradientAccumulation::new(2)?.add_to(&mut graph, &gradients)?;
    Ok(Step {
        graph,
        inputs: [x, labels],
        loss,
        accumulated,
    })
}

fn adamw() -> AdamW {
    AdamW {
        max_norm: Some(1.0),
        ..AdamW::default()
    }
}

/// The graphs of every layer's training: the step, and the update after the micro-batches.
pub fn graphs(precision: Precision) -> Vec<Graph> {
    let setting = Setting {
        precision,
        recompute: false,
        training: true,
        seed: 0,
    };
    let graphs = LAYERS.into_iter().flat_map(|(_, forward)| {
        let step = step(forward, setting).expect("the layers are sound");
        let update = step
            .accumulated
            .update_graph(&adamw())
            .expect("the update is sound");
        [step.graph, update.0]
    });
    graphs.collect()
}

/// Four micro-batches, which make two steps: their losses, and everything that is in the store after them.
fn train(
    device: &Device,
    forward: Forward,
    setting: Setting,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let Step {
        graph,
        inputs: [x, labels],
        loss,
        accumulated,
    } = step(forward, setting)?;
    let store = ParameterStore::new(device);
    store.initialize(&graph, 11)?;
    // B starts at zero: something of the adapters must be seen in the first step.
    for name in store.names().iter().filter(|name| name.ends_with("lora_b")) {
        let dims = store.read(name)?.shape().dims().to_vec();
        store.insert(name, &floats(&dims, 520))?;
    }
    let mut session = graph.compile(&store)?;
    session.poison()?;
    if session.random().is_some() {
        session.set_random(setting.seed, 0)?;
    }
    let mut update = accumulated.compile(&adamw(), &store)?;
    let mut losses = Vec::new();
    for batch in 0..4 {
        session.write(x, &floats(&[TOKENS, WIDTH], 521 + batch))?;
        session.write(labels, &ints(&[TOKENS], 531 + batch, WIDTH as u32))?;
        losses.extend(session.run_reading(&[loss])?);
        update.micro_batch_done(1e-2)?;
    }
    let state: Result<Vec<Tensor>> = store.names().iter().map(|name| store.read(name)).collect();
    Ok((losses, state?))
}

fn check(device: &Device, forward: Forward, precision: Precision) -> Result<(), Failed> {
    let setting = Setting {
        precision,
        recompute: false,
        training: true,
        seed: 3,
    };
    let first = train(device, forward, setting)?;
    if first != train(device, forward, setting)? {
        return Err("two trainings are not equal bit for bit".into());
    }
    let recomputed = Setting {
        recompute: true,
        ..setting
    };
    if first != train(device, forward, recomputed)? {
        return Err("recomputation changes the training".into());
    }
    for (what, other) in [
        ("another seed", Setting { seed: 4, ..setting }),
        (
            "a graph for evaluation",
            Setting {
                training: false,
                ..setting
            },
        ),
    ] {
        if first == train(device, forward, other)? {
            return Err(format!("{what} trains the same: there is no noise").into());
        }
    }
    if first
        .0
        .iter()
        .any(|loss| !loss.item().is_some_and(f64::is_finite))
    {
        return Err(format!("the losses are {:?}", first.0).into());
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, forward) in LAYERS {
        for (storage, precision) in [("f32", Precision::F32), ("f16", Precision::F16)] {
            let name = format!("everything::{name}_{storage}");
            trials.extend(devices::trials(&name, move |device| {
                check(device, forward, precision)
            }));
        }
    }
    trials
}
