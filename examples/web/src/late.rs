//! What rankmix makes of errors that a browser reports after the call that made them: the browser's tests look at it. They let the
//! first buffer of some name fail.

use js_sys::Promise;
use rankmix::graph::SessionOptions;
use rankmix::layers::Linear;
use rankmix::train::{AdamW, GradientAccumulation};
use rankmix::{
    Device, Graph, ParameterStore, Precision, Result, Session, Storage, Tensor, TensorType, Value,
};
use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;
use wasm_bindgen_futures::future_to_promise;

use crate::failure::Failure;

/// A linear layer and its loss.
fn layer(precision: Precision) -> Result<(Graph, Value)> {
    let mut graph = Graph::new();
    graph.set_precision(precision);
    let x = graph.input("x", TensorType::f32([4, 3]))?;
    let labels = graph.input("labels", TensorType::i32([4]))?;
    let logits = Linear::new("layer", 3, 2)
        .trained()
        .forward(&mut graph, x)?;
    let loss = graph.cross_entropy(logits, labels)?;
    graph.output(loss)?;
    Ok((graph, loss))
}

async fn compiled(graph: &Graph, store: &ParameterStore) -> Result<Session> {
    let options = SessionOptions::default();
    let mut session = graph.compile_async(store, options).await?;
    session.set("x", &Tensor::f32([4, 3], vec![0.5; 12])?)?;
    session.set("labels", &Tensor::i32([4], vec![0, 1, 0, 1])?)?;
    Ok(session)
}

fn message<T>(outcome: Result<T>) -> JsValue {
    outcome.err().map_or(JsValue::NULL, |error| {
        JsValue::from(error.to_string().as_str())
    })
}

fn answer(work: impl Future<Output = Result<Vec<JsValue>>> + 'static) -> Promise {
    future_to_promise(async move { Ok(work.await.map_err(Failure::from)?.into()) })
}

/// Initialises a store, and again after an error; brings it into 16 bits, and again after an error: the two errors or null, and
/// the loss before and after.
#[wasm_bindgen(unchecked_return_type = "Promise<unknown[]>")]
pub fn initialized_again() -> Promise {
    answer(async {
        let store = ParameterStore::new(&Device::open_async(&Default::default()).await?);
        let (graph, loss) = layer(Precision::F32)?;
        let first = store.initialize_async(&graph, 1).await;
        if first.is_err() {
            store.initialize_async(&graph, 1).await?;
        }
        let mut session = compiled(&graph, &store).await?;
        let before = session.run_reading_async(&[loss]).await?;

        let (halves, loss) = layer(Precision {
            parameters: Storage::F16,
            ..Precision::F32
        })?;
        let second = store.convert_async(&halves).await;
        if second.is_err() {
            store.convert_async(&halves).await?;
        }
        let mut session = compiled(&halves, &store).await?;
        let after = session.run_reading_async(&[loss]).await?;
        let number = |found: &[Tensor]| JsValue::from(found[0].to_f32()[0]);
        Ok(vec![
            message(first),
            message(second),
            number(&before),
            number(&after),
        ])
    })
}

/// Makes an accumulated step, and again after an error, which is that of another parameter, `stray`: the error or null, and the
/// weights after the step.
#[wasm_bindgen(unchecked_return_type = "Promise<unknown[]>")]
pub fn stepped_again() -> Promise {
    answer(async {
        let store = ParameterStore::new(&Device::open_async(&Default::default()).await?);
        let (mut graph, loss) = layer(Precision::F32)?;
        let gradients = graph.backward(loss)?;
        let accumulated = GradientAccumulation::new(1)?.add_to(&mut graph, &gradients)?;
        store.initialize_async(&graph, 1).await?;
        let mut update = accumulated.compile_async(&AdamW::default(), &store).await?;
        compiled(&graph, &store).await?.run_async().await?;

        store.insert("stray", &Tensor::f32([4], vec![0.0; 4])?)?;
        let first = update.micro_batch_done_async(0.1).await;
        if first.is_err() {
            update.micro_batch_done_async(0.1).await?;
        }
        let weights = store.read_async("layer.weight").await?.to_f32();
        let mut answer = vec![message(first)];
        answer.extend(weights.into_iter().map(JsValue::from));
        Ok(answer)
    })
}
