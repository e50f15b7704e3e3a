//! What memory binds, at the size of the copy that the limit comes from: 128 MiB a tensor.

use rankmix::ops::{Activation, AdamWConstants, Rotation};
use rankmix::{Graph, Init, Result, Value};

use super::{Case, EXPERTS, ROWS, WIDTH, backward, case, f};

pub(super) fn cases() -> Result<Vec<Case>> {
    let x = || f(&[ROWS, WIDTH]);
    let weight = || f(&[WIDTH]);
    let size = "32768x1024";
    let norm = |g: &mut Graph, v: &[Value]| g.rms_norm(v[0], v[1], 1e-5);
    let softmax = |g: &mut Graph, v: &[Value]| g.softmax(v[0]);
    let silu = |g: &mut Graph, v: &[Value]| g.silu(v[0]);
    let gated = |g: &mut Graph, v: &[Value]| g.activate(Activation::Silu, v[0], Some(v[1]));
    let rotate = |g: &mut Graph, v: &[Value]| g.rotate(Rotation::Planes, v[0], v[1]);
    let angles = f(&[ROWS, Rotation::Planes.numbers(WIDTH)?]);
    let step = |g: &mut Graph, v: &[Value]| {
        let [parameter, first, second] = ["parameter", "first", "second"]
            .map(|name| g.parameter(name, [ROWS, WIDTH], Init::Ones, true));
        let constants = AdamWConstants::default();
        g.adamw_step(parameter?, [first?, second?], v[0], v[1], None, constants)
    };
    Ok(vec![
        case("copy", size, vec![x()], |g, v| g.copy(v[0])),
        case("scale", size, vec![x()], |g, v| g.scale(v[0], 0.5)),
        case("tanh", size, vec![x()], |g, v| g.tanh(v[0])),
        case("add", size, vec![x(), x()], |g, v| g.add(v[0], v[1])),
        case("silu", size, vec![x()], silu),
        backward("silu backward", size, vec![x(), x()], &[0], silu),
        case("activation", size, vec![x(), x()], gated),
        backward(
            "activation backward",
            size,
            vec![x(), x(), x()],
            &[0, 1],
            gated,
        ),
        case("dropout", size, vec![x()], |g, v| g.dropout(v[0], 0.1)),
        case("jitter", size, vec![x()], |g, v| g.jitter(v[0], 0.1)),
        case("rotate planes", size, vec![x(), angles.clone()], rotate),
        backward(
            "rotate planes backward",
            size,
            vec![x(), angles, x()],
            &[0, 1],
            rotate,
        ),
        case("rms_norm", size, vec![x(), weight()], norm),
        backward(
            "rms_norm input gradient",
            size,
            vec![x(), weight(), x()],
            &[0],
            norm,
        ),
        backward(
            "rms_norm weight gradient",
            size,
            vec![x(), weight(), x()],
            &[1],
            norm,
        ),
        case("softmax", size, vec![x()], softmax),
        backward("softmax backward", size, vec![x(), x()], &[0], softmax),
        case(
            "softmax",
            "1048576x8",
            vec![f(&[1 << 20, EXPERTS])],
            softmax,
        ),
        case("sum rows", size, vec![x()], |g, v| g.sum(v[0], &[1])),
        case("sum columns", size, vec![x()], |g, v| g.sum(v[0], &[0])),
        case("sum all", size, vec![x()], |g, v| g.sum_all(v[0])),
        backward(
            "sum rows backward",
            size,
            vec![x(), f(&[ROWS])],
            &[0],
            |g, v| g.sum(v[0], &[1]),
        ),
        case("adamw", size, vec![x(), f(&[3])], step),
    ])
}
