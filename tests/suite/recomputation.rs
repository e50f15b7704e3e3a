//! Recomputed activations: the same numbers bit for bit in less memory, and a report that says how much less.

use libtest_mimic::{Failed, Trial};
use rankmix::graph::MemoryReport;
use rankmix::layers::{AdapterOptions, Linear, Lora, MoeLora, RotMole, RoutedOutput, Routing};
use rankmix::train::{AdamW, Optimizer};
use rankmix::{Device, Graph, Init, ParameterStore, Result, Session, Tensor, TensorType, Value};

use crate::case::{floats, ints};
use crate::devices;
use crate::metrics::relative_errors;

/// Which parts of the stack are segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segments {
    None,
    Layers,
    /// The layers in pairs, and in a pair each layer by itself.
    Nested,
}

const LAYERS: [&str; 4] = ["rotmole", "moe_lora", "lora", "rotmole_again"];
const TOKENS: usize = 67;
const WIDTH: usize = 24;

/// Four adapted layers with a norm before and a SiLU behind each, and a residual around them, under a cross-entropy.
struct Stack {
    graph: Graph,
    loss: Value,
    gradients: Vec<Value>,
    optimizer: Optimizer,
}

/// `x + silu(layer(norm(x)))`, and what the router's losses need.
fn block(graph: &mut Graph, name: &str, x: Value) -> Result<(Value, Option<RoutedOutput>)> {
    let width = graph.ty(x)?.shape.last();
    let base = Linear::new(name, width, width);
    let (options, router) = (AdapterOptions::new(4, 8.0), Routing::new(5, 2));
    let weight = graph.parameter(&format!("{name}.norm"), [width], Init::Ones, true)?;
    let normed = graph.rms_norm(x, weight, 1e-5)?;
    let (output, routed) = match name {
        "lora" => (Lora::new(base, options)?.forward(graph, normed)?, None),
        "moe_lora" => {
            let routed = MoeLora::new(base, options, router)?.forward(graph, normed)?;
            (routed.output, Some(routed))
        }
        _ => {
            let routed = RotMole::new(base, options, router)?.forward(graph, normed)?;
            (routed.output, Some(routed))
        }
    };
    let active = graph.silu(output)?;
    Ok((graph.add(x, active)?, routed))
}

fn stack(segments: Segments, (tokens, width): (usize, usize), keep: bool) -> Result<Stack> {
    let mut graph = Graph::new();
    let mut x = graph.input("x", TensorType::f32([tokens, width]))?;
    let labels = graph.input("labels", TensorType::i32([tokens]))?;
    let mut routed_layers = Vec::new();
    for pair in LAYERS.chunks(2) {
        let mut layers = |graph: &mut Graph| {
            pair.iter().try_fold(x, |x, name| {
                let (output, routed) = if segments == Segments::None {
                    block(graph, name, x)?
                } else {
                    graph.recompute(|graph| block(graph, name, x))?
                };
                routed_layers.extend(routed);
                Ok(output)
            })
        };
        x = if segments == Segments::Nested {
            graph.recompute(layers)?
        } else {
            layers(&mut graph)?
        };
    }
    let mut loss = graph.cross_entropy(x, labels)?;
    for routed in routed_layers {
        let auxiliary = routed.auxiliary_loss(&mut graph, 0.01, 0.001)?;
        loss = graph.add(loss, auxiliary)?;
    }
    graph.output(loss)?;
    let found = graph.backward(loss)?;
    let gradients: Vec<Value> = found
        .pairs()
        .iter()
        .map(|&(_, gradient)| gradient)
        .collect();
    if keep {
        for &gradient in &gradients {
            graph.output(gradient)?;
        }
    }
    let adamw = AdamW {
        max_norm: Some(1.0),
        ..AdamW::default()
    };
    let optimizer = adamw.add_to(&mut graph, &found)?;
    Ok(Stack {
        graph,
        loss,
        gradients,
        optimizer,
    })
}

fn session_of(device: &Device, stack: &Stack) -> Result<(ParameterStore, Session)> {
    let store = ParameterStore::new(device);
    store.initialize(&stack.graph, 9)?;
    for name in store.names() {
        // B starts at zero: its layer's gradients would be zero too.
        if name.ends_with("lora_b") && !name.starts_with("adamw") {
            let dims = store.read(&name)?.shape().dims().to_vec();
            store.insert(&name, &floats(&dims, 401))?;
        }
    }
    let mut session = stack.graph.compile(&store)?;
    session.poison()?;
    session.set("x", &floats(&[TOKENS, WIDTH], 402))?;
    session.set("labels", &ints(&[TOKENS], 403, WIDTH as u32))?;
    Ok((store, session))
}

/// The losses of three steps; their gradients, and all parameters after them.
fn train(device: &Device, segments: Segments) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let mut stack = stack(segments, (TOKENS, WIDTH), true)?;
    let (store, mut session) = session_of(device, &stack)?;
    let (mut losses, mut found) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        stack.optimizer.prepare(&mut session, 1e-2)?;
        let read: Vec<Value> = stack
            .gradients
            .iter()
            .copied()
            .chain([stack.loss])
            .collect();
        found.extend(session.run_reading(&read)?);
        losses.extend(found.pop());
    }
    for name in store.names() {
        found.push(store.read(&name)?);
    }
    Ok((losses, found))
}

fn training_is_equal(device: &Device, segments: Segments) -> Result<(), Failed> {
    let (kept, recomputed) = (train(device, Segments::None)?, train(device, segments)?);
    if kept != recomputed {
        return Err("losses, gradients or parameters are not equal bit for bit".into());
    }
    // A comparison of trainings that stand still would show nothing.
    let losses: Vec<f64> = kept.0.iter().filter_map(Tensor::item).collect();
    if losses[2] >= losses[0] || losses.iter().any(|loss| loss.is_nan()) {
        return Err(format!("the losses are {losses:?}").into());
    }
    Ok(())
}

/// The report of a step, and how many kernels it launches.
fn memory(
    device: &Device,
    segments: Segments,
    sizes: (usize, usize),
) -> Result<(MemoryReport, usize)> {
    let stack = stack(segments, sizes, false)?;
    let store = ParameterStore::new(device);
    store.initialize(&stack.graph, 9)?;
    let session = stack.graph.compile(&store)?;
    Ok((session.memory(), session.launches().len()))
}

fn the_report_says_what_is_saved(device: &Device) -> Result<(), Failed> {
    for sizes in [(512, 128), (133, 48)] {
        let (kept, launches) = memory(device, Segments::None, sizes)?;
        if kept.pool_without_recomputation != kept.pool {
            return Err(format!("nothing is recomputed, and yet: {kept:?}").into());
        }
        let mut before = launches;
        for segments in [Segments::Layers, Segments::Nested] {
            let (recomputed, more_launches) = memory(device, segments, sizes)?;
            println!(
                "{sizes:?} {segments:?}: pool {} of {} bytes, {more_launches} launches instead of {launches}",
                recomputed.pool, recomputed.pool_without_recomputation
            );
            if recomputed.pool_without_recomputation != kept.pool {
                return Err(format!(
                    "{sizes:?} {segments:?}: {recomputed:?}; the pool of the graph without segments is {}",
                    kept.pool
                )
                .into());
            }
            // Of each layer what goes in is kept, not the norm, the latents and the activation's operand.
            if recomputed.pool as f64 > 0.75 * kept.pool as f64 {
                return Err(format!("{sizes:?} {segments:?}: {recomputed:?}").into());
            }
            if device.adapter().is_some() && more_launches <= before {
                return Err(format!("{more_launches} launches, {before} before").into());
            }
            before = more_launches;
        }
    }
    Ok(())
}

/// Two backward passes over one graph, the second of another loss, give what two graphs give.
fn two_backward_passes(device: &Device) -> Result<(), Failed> {
    let build = |recompute: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([9, 8]))?;
        let inside = |graph: &mut Graph| -> Result<Value> {
            let layer = MoeLora::new(
                Linear::new("layer", 8, 8),
                AdapterOptions::new(2, 4.0),
                Routing::new(3, 2),
            )?;
            let hidden = layer.forward(graph, x)?.output;
            let active = graph.silu(hidden)?;
            graph.square(active)
        };
        let y = if recompute {
            graph.recompute(inside)?
        } else {
            inside(&mut graph)?
        };
        let losses = [graph.sum_all(y)?, {
            let square = graph.square(y)?;
            graph.mean_all(square)?
        }];
        let mut values = losses.to_vec();
        for loss in losses {
            let wanted: Vec<Value> = [x].into_iter().chain(graph.trainable()).collect();
            values.extend(graph.gradients(loss, &wanted)?);
        }
        for &value in &values {
            graph.output(value)?;
        }
        let store = ParameterStore::new(device);
        store.initialize(&graph, 2)?;
        store.insert("layer.lora_b", &floats(&[3, 8, 2], 404))?;
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.write(x, &floats(&[9, 8], 405))?;
        session.run_reading(&values)
    };
    if build(false)? == build(true)? {
        Ok(())
    } else {
        Err("they are not equal bit for bit".into())
    }
}

/// The gradient of a gradient with respect to a value that the first backward pass saw only as a recomputed copy.
fn second_derivatives(device: &Device) -> Result<(), Failed> {
    let build = |recompute: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([7]))?;
        let inside = |graph: &mut Graph| -> Result<(Value, Value)> {
            let inner = graph.scale(x, 1.5)?;
            let exp = graph.exp(inner)?;
            let product = graph.mul(exp, inner)?;
            Ok((inner, graph.square(product)?))
        };
        let (inner, y) = if recompute {
            graph.recompute(inside)?
        } else {
            inside(&mut graph)?
        };
        let loss = graph.sum_all(y)?;
        let first = graph.gradients(loss, &[inner, x])?;
        let square = graph.square(first[0])?;
        let penalty = graph.sum_all(square)?;
        let second = graph.gradients(penalty, &[inner, x])?;
        let values: Vec<Value> = first.into_iter().chain(second).collect();
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&ParameterStore::new(device))?;
        session.poison()?;
        session.write(x, &floats(&[7], 406))?;
        session.run_reading(&values)
    };
    let (kept, recomputed) = (build(false)?, build(true)?);
    if kept != recomputed {
        return Err(format!("{kept:?} without, {recomputed:?} with").into());
    }
    // y = (u e^u)^2 with u = 1.5 x; the penalty is the square of y' = 2 u (1 + u) e^2u.
    let expected: Vec<f64> = floats(&[7], 406)
        .to_f64()
        .iter()
        .map(|x| {
            let u = 1.5 * x;
            let e = (2.0 * u).exp();
            let first = 2.0 * u * (1.0 + u) * e;
            2.0 * first * (2.0 * (1.0 + 2.0 * u) + 4.0 * u * (1.0 + u)) * e
        })
        .collect();
    let (error, _) = relative_errors(&recomputed[2].to_f64(), &expected);
    if error > 1e-5 {
        return Err(format!("relative error {error:.2e}").into());
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, segments) in [("layers", Segments::Layers), ("nested", Segments::Nested)] {
        trials.extend(devices::trials(
            &format!("recomputation::{name}_train_bit_for_bit"),
            move |device| training_is_equal(device, segments),
        ));
    }
    trials.extend(devices::trials(
        "recomputation::two_backward_passes",
        two_backward_passes,
    ));
    trials.extend(devices::trials(
        "recomputation::second_derivatives",
        second_derivatives,
    ));
    trials.extend(devices::own_trials(
        "recomputation::the_report_says_what_is_saved",
        the_report_says_what_is_saved,
    ));
    trials
}
