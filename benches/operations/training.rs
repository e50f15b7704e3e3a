//! Losses, what is made of gradients, and the optimiser's step.

use rankmix::Init;
use rankmix::ops::{AdamWConstants, LossScaling};
use rankmix::train::AdamW;

use super::{Bench, elements, f, forward, i, with_gradient};

pub(super) fn benches() -> Vec<Bench> {
    const T: usize = 512;
    const D: usize = 1024;
    vec![
        Bench {
            op: "accumulate",
            size: "1048576",
            inputs: vec![f(&[1 << 20]), f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.accumulate(v[0], v[1])),
        },
        Bench {
            op: "clear",
            size: "1048576",
            inputs: vec![],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, _| {
                let sum = g.parameter("sum", [1 << 20], Init::Ones, false)?;
                g.clear(sum)
            }),
        },
        Bench {
            op: "assign",
            size: "1048576",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| {
                let parameter = g.parameter("parameter", [1 << 20], Init::Ones, false)?;
                g.assign(parameter, v[0])
            }),
        },
        Bench {
            op: "gradient_norm",
            size: "1048576",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| g.gradient_norm(v, 1.0)),
        },
        Bench {
            op: "adamw",
            size: "1048576",
            inputs: vec![f(&[1 << 20]), f(&[3])],
            limit: 1,
            work: elements(1 << 20),
            build: forward(|g, v| {
                let theta = g.parameter("theta", [1 << 20], Init::Ones, true)?;
                let moments = [
                    g.parameter("first", [1 << 20], Init::Zeros, false)?,
                    g.parameter("second", [1 << 20], Init::Zeros, false)?,
                ];
                g.adamw_step(theta, moments, v[0], v[1], None, AdamWConstants::default())
            }),
        },
        // The scale, the gradient, its norm, the next scale and AdamW; the schedule is the optimiser's own input.
        Bench {
            op: "loss_scale",
            size: "1048576_scaled_adamw_step",
            inputs: vec![f(&[1 << 20])],
            limit: 1,
            work: elements(1 << 20),
            build: Box::new(|g, v| {
                let theta = g.parameter("theta", [1 << 20], Init::Ones, true)?;
                let product = g.mul(theta, v[0])?;
                let loss = g.sum_all(product)?;
                let gradients = g.backward_scaled(loss, LossScaling::default())?;
                AdamW::default().add_to(g, &gradients)?;
                Ok(vec![loss])
            }),
        },
        Bench {
            op: "selection_bias",
            size: "32768pairs_64experts",
            inputs: vec![i(&[4096, 8])],
            limit: 64,
            work: elements(4096 * 8),
            build: forward(|g, v| {
                let segments = g.segments(v[0], 64)?;
                let bias = g.parameter("bias", [64], Init::Zeros, false)?;
                g.update_selection_bias(bias, segments, 0.001)
            }),
        },
        Bench {
            op: "router_losses",
            size: "4096x64_top8_forward_backward",
            inputs: vec![f(&[4096, 64]), i(&[4096, 8])],
            limit: 64,
            work: elements(4096 * 64),
            build: Box::new(|g, v| {
                let balance = g.balance_loss(v[0], v[1])?.loss;
                let z = g.z_loss(v[0])?;
                let loss = g.add(balance, z)?;
                g.gradients(loss, &v[..1])
            }),
        },
        Bench {
            op: "cross_entropy",
            size: "512x1024_forward_backward",
            inputs: vec![f(&[T, D]), i(&[T]), f(&[])],
            limit: D,
            work: elements(T * D),
            build: with_gradient(|g, v| g.cross_entropy(v[0], v[1])),
        },
    ]
}
