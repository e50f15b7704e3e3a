//! What the losses promise beyond their gradients, on every device: values known by hand, and the special cases.

use libtest_mimic::{Failed, Trial};
use rankmix::ops::IGNORED_LABEL;
use rankmix::{Device, Error, Graph, ParameterStore, Result, Session, Tensor, TensorType, Value};

use crate::devices;

/// Compares the elements of a result with numbers known by hand.
fn near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) -> Result<(), Failed> {
    let close = found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(f, e)| (f - e).abs() <= tolerance);
    if close {
        Ok(())
    } else {
        Err(format!("{what}: {found:?}, expected {expected:?}").into())
    }
}

/// The cross-entropy of the inputs `logits` and `labels`, and its gradient.
fn cross_entropy(device: &Device, rows: usize, classes: usize) -> Result<(Session, [Value; 2])> {
    let mut graph = Graph::new();
    let logits = graph.input("logits", TensorType::f32([rows, classes]))?;
    let labels = graph.input("labels", TensorType::i32([rows]))?;
    let loss = graph.cross_entropy(logits, labels)?;
    let gradient = graph.gradients(loss, &[logits])?[0];
    graph.output(loss)?;
    graph.output(gradient)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.poison()?;
    Ok((session, [loss, gradient]))
}

fn constant(rows: usize, columns: usize, value: f32) -> Result<Tensor> {
    Tensor::f32([rows, columns], vec![value; rows * columns])
}

fn a_label_out_of_range_is_an_error_that_names_it(device: &Device) -> Result<(), Failed> {
    let (mut session, _) = cross_entropy(device, 3, 5)?;
    session.set("labels", &Tensor::i32([3], vec![4, IGNORED_LABEL, 0])?)?;
    for bad in [5, -1, -99, -101, i32::MAX, i32::MIN] {
        let error = session.set("labels", &Tensor::i32([3], vec![0, IGNORED_LABEL, bad])?);
        let named = matches!(
            &error,
            Err(Error::IndexOutOfRange { name, position: 2, index, limit: 5, ignored: Some(IGNORED_LABEL) })
                if name.contains("labels") && *index == bad
        );
        if !named {
            return Err(format!("the label {bad} gave {error:?}").into());
        }
    }
    Ok(())
}

fn all_labels_ignored_gives_a_loss_and_gradients_of_zero(device: &Device) -> Result<(), Failed> {
    let (mut session, read) = cross_entropy(device, 3, 5)?;
    session.set(
        "logits",
        &Tensor::f32([3, 5], (0..15).map(|i| 0.3 * i as f32 - 2.0).collect())?,
    )?;
    session.set("labels", &Tensor::i32([3], vec![IGNORED_LABEL; 3])?)?;
    let results = session.run_reading(&read)?;
    near("the loss", &results[0].to_f64(), &[0.0], 0.0)?;
    near("the gradient", &results[1].to_f64(), &[0.0; 15], 0.0)
}

fn ignored_rows_have_no_gradient_and_do_not_dilute_the_mean(device: &Device) -> Result<(), Failed> {
    let (mut session, read) = cross_entropy(device, 3, 4)?;
    session.set("logits", &constant(3, 4, 0.5)?)?;
    session.set(
        "labels",
        &Tensor::i32([3], vec![IGNORED_LABEL, 2, IGNORED_LABEL])?,
    )?;
    let results = session.run_reading(&read)?;
    near("the loss", &results[0].to_f64(), &[4_f64.ln()], 1e-6)?;
    let gradient = results[1].to_f64();
    near(
        "ignored rows",
        &[&gradient[..4], &gradient[8..]].concat(),
        &[0.0; 8],
        0.0,
    )?;
    near(
        "the row that counts",
        &gradient[4..8],
        &[0.25, 0.25, -0.75, 0.25],
        1e-6,
    )
}

fn uniform_logits_have_the_cross_entropy_of_a_guess(device: &Device) -> Result<(), Failed> {
    for (classes, logit) in [(1, 3.0), (2, 0.0), (133, -20.0), (5000, 1e4)] {
        let (mut session, [loss, _]) = cross_entropy(device, 2, classes)?;
        session.set("logits", &constant(2, classes, logit)?)?;
        session.set("labels", &Tensor::i32([2], vec![0, classes as i32 - 1])?)?;
        let found = session.run_reading(&[loss])?[0].to_f64();
        let expected = (classes as f64).ln();
        near("the loss", &found, &[expected], 1e-5 * expected.max(0.1))?;
    }
    Ok(())
}

fn the_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse(
    device: &Device,
) -> Result<(), Failed> {
    let (tokens, experts, k) = (6, 4, 2);
    let mut graph = Graph::new();
    let logits = graph.input("logits", TensorType::f32([tokens, experts]))?;
    let chosen = graph.input("experts", TensorType::i32([tokens, k]))?;
    let collapsed_chosen = graph.input("one expert", TensorType::i32([tokens, 1]))?;
    let balanced = graph.balance_loss(logits, chosen)?;
    let collapsed_logits = graph.input("collapsed logits", TensorType::f32([tokens, experts]))?;
    let collapsed = graph.balance_loss(collapsed_logits, collapsed_chosen)?;
    let read = [balanced.loss, balanced.load, collapsed.loss, collapsed.load];
    for value in read {
        graph.output(value)?;
    }
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.set("logits", &constant(tokens, experts, -1.5)?)?;
    let turns = (0..tokens * k)
        .map(|choice| (choice % experts) as i32)
        .collect();
    session.set("experts", &Tensor::i32([tokens, k], turns)?)?;
    session.set("one expert", &Tensor::i32([tokens, 1], vec![2; tokens])?)?;
    let certain = (0..tokens * experts)
        .map(|i| if i % experts == 2 { 100.0 } else { 0.0 })
        .collect();
    session.set(
        "collapsed logits",
        &Tensor::f32([tokens, experts], certain)?,
    )?;
    let results = session.run_reading(&read)?;
    let expected: [&[f64]; 4] = [&[1.0], &[0.25; 4], &[4.0], &[0.0, 0.0, 1.0, 0.0]];
    for (found, expected) in results.iter().zip(expected) {
        near("balance", &found.to_f64(), expected, 1e-5)?;
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    type Check = fn(&Device) -> Result<(), Failed>;
    let checks: [(&str, Check); 5] = [
        (
            "a_label_out_of_range_is_an_error_that_names_it",
            a_label_out_of_range_is_an_error_that_names_it,
        ),
        (
            "all_labels_ignored_gives_zero",
            all_labels_ignored_gives_a_loss_and_gradients_of_zero,
        ),
        (
            "ignored_rows_do_not_count",
            ignored_rows_have_no_gradient_and_do_not_dilute_the_mean,
        ),
        (
            "uniform_logits_are_a_guess",
            uniform_logits_have_the_cross_entropy_of_a_guess,
        ),
        (
            "balance_and_collapse",
            the_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse,
        ),
    ];
    checks
        .into_iter()
        .flat_map(|(name, check)| devices::trials(&format!("losses::{name}"), check))
        .collect()
}
