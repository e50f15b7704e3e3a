//! One RotMoLE layer: forward, backward, one optimiser step, in one submission.
//!
//!     cargo run --release --example quickstart

use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
use rankmix::train::AdamW;
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType};

fn main() -> Result<()> {
    let device = Device::open()?; // the best GPU, or the CPU
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([64, 256]))?;
    let target = graph.input("target", TensorType::f32([64, 128]))?;

    let base = Linear::new("proj", 256, 128); // frozen
    let layer = RotMole::new(base, AdapterOptions::new(8, 16.0), Routing::new(4, 2))?;
    let y = layer.forward(&mut graph, x)?.output;
    let error = graph.sub(y, target)?;
    let square = graph.square(error)?;
    let loss = graph.mean_all(square)?;
    graph.output(loss)?;

    let gradients = graph.backward(loss)?;
    let mut optimizer = AdamW::default().add_to(&mut graph, &gradients)?;

    let store = ParameterStore::new(&device);
    store.initialize(&graph, 42)?;
    let mut session = graph.compile(&store)?;
    session.set(
        "x",
        &Tensor::f32(
            [64, 256],
            (0..64 * 256).map(|i| (i as f32 * 0.1).sin()).collect(),
        )?,
    )?;
    session.set(
        "target",
        &Tensor::f32(
            [64, 128],
            (0..64 * 128).map(|i| (i as f32 * 0.3).cos()).collect(),
        )?,
    )?;
    println!("{}", device.name());
    for step in 0..5 {
        optimizer.prepare(&mut session, 1e-2)?;
        let loss = session.run_reading(&[loss])?[0].to_f32()[0];
        println!("step {step}: loss {loss:.4}");
    }
    Ok(())
}
