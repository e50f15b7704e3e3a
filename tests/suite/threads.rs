//! The CPU executor's results do not depend on how many threads there are, bit for bit.

use libtest_mimic::{Failed, Trial};
use rankmix::ops::{Activation, AdamWConstants};
use rankmix::{Device, Graph, Init, ParameterStore, Result, Tensor, TensorType, Value};

use crate::case::{floats, ints};

/// No multiple of any chunk, and many chunks of each operation.
const ROWS: usize = 3077;
const COLUMNS: usize = 45;
const CLASSES: usize = 7;

/// Appends the small operations with their gradients; returns what is compared.
fn build(graph: &mut Graph) -> Result<Vec<Value>> {
    let x = graph.input("x", TensorType::f32([ROWS, COLUMNS]))?;
    let row = graph.input("row", TensorType::f32([COLUMNS]))?;
    let column = graph.input("column", TensorType::f32([ROWS, 1]))?;
    let ids = graph.input("ids", TensorType::i32([ROWS]))?;
    let chosen = graph.input("chosen", TensorType::i32([ROWS, 1]))?;
    let table = graph.parameter(
        "table",
        [CLASSES, COLUMNS],
        Init::Normal { deviation: 1.0 },
        true,
    )?;
    let embedded = graph.embedding(table, ids)?;
    let mut y = graph.add(x, embedded)?;
    y = graph.tanh(y)?;
    y = graph.mul(y, row)?;
    y = graph.sub(column, y)?;
    y = graph.rms_norm(y, row, 1e-5)?;
    y = graph.silu(y)?;
    y = graph.activate(Activation::Gelu, y, Some(x))?;
    y = graph.dropout(y, 0.1)?;
    let classes = graph.sum(y, &[1])?;
    let classes = graph.reshape(classes, [ROWS, 1])?;
    let slopes = graph.input("slopes", TensorType::f32([CLASSES]))?;
    let logits = graph.mul(classes, slopes)?;
    let cross_entropy = graph.cross_entropy(logits, ids)?;
    let z_loss = graph.z_loss(logits)?;
    let balance = graph.balance_loss(logits, chosen)?.loss;
    let mut loss = graph.add(cross_entropy, z_loss)?;
    loss = graph.add(loss, balance)?;
    let mean = graph.mean_all(y)?;
    loss = graph.add(loss, mean)?;
    let gradients = graph.gradients(loss, &[x, row, column, table, slopes])?;
    let norm = graph.gradient_norm(&gradients, 1e-3)?;
    let moment = graph.parameter("moment", [ROWS, COLUMNS], Init::Zeros, false)?;
    let moment = graph.accumulate_into(moment, gradients[0], 0.25)?;
    let schedule = graph.constant(Tensor::f32([3], vec![0.1, 10.0, 30.0])?)?;
    let state = ["weight", "first", "second"]
        .map(|name| graph.parameter(name, [ROWS, COLUMNS], Init::Zeros, false));
    let [weight, first, second] = state;
    let moments = [first?, second?];
    let constants = AdamWConstants::default();
    let stepped = graph.adamw_step(
        weight?,
        moments,
        gradients[0],
        schedule,
        Some(norm),
        constants,
    )?;
    Ok(gradients
        .into_iter()
        .chain([loss, norm, moment, stepped])
        .collect())
}

fn results(threads: usize) -> Result<Vec<Tensor>, Failed> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()?;
    pool.install(|| {
        let mut graph = Graph::new();
        let read = build(&mut graph)?;
        for &value in &read {
            graph.output(value)?;
        }
        let store = ParameterStore::new(&Device::cpu());
        store.initialize(&graph, 3)?;
        let mut session = graph.compile(&store)?;
        for (name, dims, seed) in [
            ("x", &[ROWS, COLUMNS][..], 1),
            ("row", &[COLUMNS], 2),
            ("column", &[ROWS, 1], 3),
            ("slopes", &[CLASSES], 4),
        ] {
            session.set(name, &floats(dims, seed))?;
        }
        session.set("ids", &ints(&[ROWS], 5, CLASSES as u32))?;
        session.set("chosen", &ints(&[ROWS, 1], 6, CLASSES as u32))?;
        session.set_random(1, 2)?;
        Ok(session.run_reading(&read)?)
    })
}

fn do_not_change_results() -> Result<(), Failed> {
    let one = results(1)?;
    for tensor in &one {
        if tensor.to_f64().iter().any(|x| !x.is_finite()) {
            return Err("a result is not finite".into());
        }
    }
    for threads in [2, 3, 8] {
        if results(threads)? != one {
            return Err(format!("{threads} threads give other numbers than one").into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    vec![Trial::test(
        "threads::do_not_change_results",
        do_not_change_results,
    )]
}
