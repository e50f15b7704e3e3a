//! What an optimiser's step is made of.

use rankmix::ops::LossScaling;
use rankmix::train::AdamW;
use rankmix::{Graph, Init, Result, Value};

use super::{Before, Case, ROWS, WIDTH, case, f, grouped};

fn parameter(g: &mut Graph, rows: usize) -> Result<Value> {
    g.parameter("parameter", [rows, WIDTH], Init::Ones, true)
}

pub(super) fn cases() -> Vec<Case> {
    let x = || f(&[ROWS, WIDTH]);
    let size = "32768x1024";
    vec![
        case("accumulate", size, vec![x()], |g, v| {
            let sum = parameter(g, ROWS)?;
            g.accumulate_into(sum, v[0], 1.0)
        }),
        case("clear", size, vec![], |g, _| {
            let parameter = parameter(g, ROWS)?;
            g.clear(parameter)
        }),
        case("assign", size, vec![x()], |g, v| {
            let parameter = parameter(g, ROWS)?;
            g.assign(parameter, v[0])
        }),
        case("gradient_norm", size, vec![x()], |g, v| {
            g.gradient_norm(v, 1.0)
        }),
        grouped(
            "update_selection_bias",
            "32768 pairs, 64 experts",
            vec![],
            [4096, 8, 64],
            |g, _, segments| {
                let bias = g.parameter("bias", [64], Init::Zeros, false)?;
                Ok(vec![g.update_selection_bias(bias, segments, 0.001)?])
            },
        ),
        // From the loss on: its scale, the gradient, the norm, the next scale, AdamW.
        Case {
            name: "scaled AdamW step".to_owned(),
            size: "1024x1024".to_owned(),
            operands: vec![f(&[WIDTH, WIDTH])],
            prepare: Box::new(|g, v| {
                let parameter = parameter(g, WIDTH)?;
                let product = g.mul(parameter, v[0])?;
                Ok(Before::values(vec![g.sum_all(product)?]))
            }),
            build: Box::new(|g, _, before| {
                let gradients = g.backward_scaled(before.values[0], LossScaling::default())?;
                AdamW::default().add_to(g, &gradients)?;
                Ok(Vec::new())
            }),
        },
    ]
}
