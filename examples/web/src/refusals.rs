//! What rankmix answers to calls that would wait: the browser's tests look at it.

use js_sys::Promise;
use rankmix::graph::SessionOptions;
use rankmix::layers::Linear;
use rankmix::train::{AdamW, GradientAccumulation};
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType};
use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;
use wasm_bindgen_futures::future_to_promise;

use crate::failure::Failure;

/// The messages of all calls that wait, made where waiting is impossible. Their async forms are made too, and must succeed.
#[wasm_bindgen(unchecked_return_type = "Promise<string[]>")]
pub fn refusals() -> Promise {
    future_to_promise(async move {
        let messages = refused().await.map_err(Failure::from)?;
        Ok(messages.into())
    })
}

fn message<T>(outcome: Result<T>) -> String {
    match outcome {
        Ok(_) => "did not refuse".to_owned(),
        Err(error) => error.to_string(),
    }
}

async fn refused() -> Result<Vec<JsValue>> {
    let mut messages = vec![message(Device::open()), message(Device::list())];
    let device = Device::open_async(&Default::default()).await?;
    messages.push(message(device.wait()));

    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([4, 3]))?;
    let labels = graph.input("labels", TensorType::i32([4]))?;
    let logits = Linear::new("layer", 3, 2)
        .trained()
        .forward(&mut graph, x)?;
    let loss = graph.cross_entropy(logits, labels)?;
    graph.output(loss)?;
    let gradients = graph.backward(loss)?;
    let accumulated = GradientAccumulation::new(1)?.add_to(&mut graph, &gradients)?;
    let store = ParameterStore::new(&device);
    messages.push(message(store.initialize(&graph, 1)));
    store.initialize_async(&graph, 1).await?;
    messages.push(message(store.convert(&graph)));
    store.convert_async(&graph).await?;
    messages.push(message(store.read("layer.weight")));
    store.read_async("layer.weight").await?;
    messages.push(message(accumulated.compile(&AdamW::default(), &store)));
    let mut update = accumulated.compile_async(&AdamW::default(), &store).await?;

    let mut session = graph
        .compile_async(&store, SessionOptions::default())
        .await?;
    session.write(x, &Tensor::f32([4, 3], vec![0.5; 12])?)?;
    session.write(labels, &Tensor::i32([4], vec![0, 1, 0, 1])?)?;
    messages.push(message(session.run()));
    messages.push(message(session.run_reading(&[loss])));
    session.run_async().await?;
    messages.push(message(session.read(loss)));
    session.read_async(loss).await?;
    messages.push(message(session.profile()));
    messages.push(message(update.micro_batch_done(0.1)));
    update.micro_batch_done_async(0.1).await?;
    device.wait_async().await?;
    Ok(messages.into_iter().map(JsValue::from).collect())
}
