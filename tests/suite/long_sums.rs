//! Sums over so many elements that one 32-bit number, added to one by one, is wrong: it stops at 2^24 ones, and drifts long before.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{AdapterClass, Capabilities};
use rankmix::ops::{Layout, MatMul};
use rankmix::{Device, Error, Graph, Init, ParameterStore, Result, Tensor, TensorType, Value};

use crate::devices;

/// What a sum may be off, as a part of it: kernels add up to 4096 equal numbers one by one, whose rounding goes one way.
const TOLERANCE: f64 = 1e-4;
/// Rows of the sums over rows: a device reads them in a moment, and added one by one they are off by some 1e-2.
const ROWS: usize = 1 << 20;

fn constant(dims: &[usize], value: f32) -> Result<Tensor> {
    Tensor::f32(dims, vec![value; dims.iter().product()])
}

/// Runs the graph of one input, all of whose elements are `value`, and compares every element of each result with the number beside it.
fn check(
    device: &Device,
    dims: &[usize],
    value: f32,
    build: impl Fn(&mut Graph, Value) -> Result<Vec<(&'static str, Value, f64)>>,
) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32(dims))?;
    let results = build(&mut graph, x)?;
    for (_, result, _) in &results {
        graph.output(*result)?;
    }
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &constant(dims, value)?)?;
    let read: Vec<Value> = results.iter().map(|(_, result, _)| *result).collect();
    let mut wrong = Vec::new();
    for ((name, _, expected), found) in results.iter().zip(session.run_reading(&read)?) {
        let far =
            |found: &f64| found.is_nan() || (found - expected).abs() > TOLERANCE * expected.abs();
        let found = found.to_f64();
        wrong.extend(
            (found.iter().find(|found| far(found)))
                .map(|found| format!("{name} is {found}, expected {expected}")),
        );
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; ").into())
    }
}

fn of_everything(device: &Device) -> Result<(), Failed> {
    let count = 1 << 25;
    check(device, &[count], 1.0, |graph, x| {
        let norm = graph.gradient_norm(&[x], f32::MAX)?;
        let both = [count as f64, (count as f64).sqrt()];
        let first = graph.constant(Tensor::f32([2], vec![1.0, 0.0])?)?;
        let norm = graph.mul(norm, first)?;
        Ok(vec![
            ("the sum", graph.sum_all(x)?, both[0]),
            ("the mean", graph.mean_all(x)?, 1.0),
            ("the norm", graph.sum_all(norm)?, both[1]),
        ])
    })
}

/// The gradients of a bias and of a norm's weight.
fn over_rows(device: &Device) -> Result<(), Failed> {
    let columns = 8;
    let sum = 0.1_f32;
    let total = f64::from(sum) * ROWS as f64;
    check(device, &[ROWS, columns], sum, |graph, x| {
        let weight = graph.constant(constant(&[columns], 1.0)?)?;
        let ones = graph.constant(constant(&[ROWS, columns], 1.0)?)?;
        // The root mean square of ones is 1: the weight's gradient is the sum of dy, which is x here.
        let y = graph.rms_norm(ones, weight, 1e-12)?;
        let product = graph.mul(y, x)?;
        let loss = graph.sum_all(product)?;
        let of_weight = graph.gradients(loss, &[weight])?[0];
        Ok(vec![
            ("the sum of columns", graph.sum(x, &[0])?, total),
            ("the norm's weight's gradient", of_weight, total),
        ])
    })
}

/// The gradient of the row of a table that every place has: padding, say.
fn of_one_id(device: &Device) -> Result<(), Failed> {
    let (places, columns) = (250_000, 3);
    let sum = 0.1_f32;
    check(device, &[places, columns], sum, |graph, x| {
        let table = graph.constant(constant(&[2, columns], 1.0)?)?;
        let ids = graph.constant(Tensor::i32([places], vec![1; places])?)?;
        let rows = graph.embedding(table, ids)?;
        let product = graph.mul(rows, x)?;
        let loss = graph.sum_all(product)?;
        let gradient = graph.gradients(loss, &[table])?[0];
        let last = graph.constant(Tensor::f32([2, 1], vec![0.0, 1.0])?)?;
        let gradient = graph.mul(gradient, last)?;
        let gradient = graph.sum(gradient, &[0])?;
        let expected = f64::from(sum) * places as f64;
        Ok(vec![("the table's gradient", gradient, expected)])
    })
}

fn of_losses(device: &Device) -> Result<(), Failed> {
    let experts = 3;
    check(device, &[ROWS, experts], 0.3, |graph, logits| {
        let labels = graph.constant(Tensor::i32([ROWS], vec![1; ROWS])?)?;
        let chosen = graph.constant(Tensor::i32([ROWS, 1], vec![2; ROWS])?)?;
        let entropy = (experts as f64).ln();
        let balance = graph.balance_loss(logits, chosen)?;
        let segments = graph.segments(chosen, experts)?;
        let metrics = graph.router_metrics(logits, segments, None)?;
        Ok(vec![
            (
                "cross-entropy",
                graph.cross_entropy(logits, labels)?,
                entropy,
            ),
            (
                "the z loss",
                graph.z_loss(logits)?,
                (entropy + f64::from(0.3_f32)).powi(2),
            ),
            ("the balance loss", balance.loss, 1.0),
            ("the router's entropy", metrics.entropy, entropy),
        ])
    })
}

/// A product, and a softmax, over more than llvmpipe's loops take: see `src/ops/turns.rs`.
fn of_long_rows(device: &Device) -> Result<(), Failed> {
    let (k, value) = (300_000, 0.1_f32);
    check(device, &[k, 4], value, |graph, x| {
        let options = MatMul {
            transpose_a: true,
            ..MatMul::default()
        };
        let square = graph.matmul_with(x, x, options, None)?;
        let expected = f64::from(value).powi(2) * k as f64;
        Ok(vec![("the product", square, expected)])
    })?;
    let columns = 250_000;
    check(device, &[2, columns], value, |graph, x| {
        let shares = graph.softmax(x)?;
        Ok(vec![("a share", shares, 1.0 / columns as f64)])
    })
}

/// Pairs that could all be of one expert, on a software driver whose loops would end before.
fn too_many_pairs_are_an_error() -> Result<(), Failed> {
    let software = Capabilities {
        class: AdapterClass::Software,
        ..Capabilities::webgpu_defaults()
    };
    let launches = |pairs: usize, capabilities: &Capabilities| {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([pairs, 1]))?;
        let w = graph.parameter("w", [2, 1, 1], Init::Zeros, true)?;
        let experts = graph.constant(Tensor::i32([pairs], vec![0; pairs])?)?;
        let segments = graph.segments(experts, 2)?;
        let y = graph.shrink(x, w, Layout::OutIn, segments)?;
        let loss = graph.sum_all(y)?;
        let gradient = graph.gradients(loss, &[w])?[0];
        graph.output(gradient)?;
        graph.launches(capabilities, false)
    };
    launches(65_000, &software)?;
    launches(70_000, &Capabilities::webgpu_defaults())?;
    match launches(70_000, &software) {
        Err(Error::Limit { needed, limit, .. }) => {
            assert_eq!((needed, limit), (70_000, 65_000));
            Ok(())
        }
        other => Err(format!("{other:?}").into()),
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = devices::own_trials("long_sums::of_everything", of_everything);
    trials.extend(devices::own_trials("long_sums::over_rows", over_rows));
    trials.extend(devices::own_trials("long_sums::of_one_id", of_one_id));
    trials.extend(devices::own_trials("long_sums::of_losses", of_losses));
    trials.extend(devices::own_trials("long_sums::of_long_rows", of_long_rows));
    trials.push(Trial::test(
        "long_sums::too_many_pairs_are_an_error",
        too_many_pairs_are_an_error,
    ));
    trials
}
