//! LoRA by hand: six products, and the backward pass that autograd would find.

use ndarray::Array2;

use crate::{RANK, Step, TOKENS, WIDTH};

/// Numbers in -bound..bound that are all different.
fn spread(rows: usize, columns: usize, bound: f32) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(row, column)| {
        let number = (row * columns + column) as f32;
        bound * ((number * 0.618_034).fract() * 2.0 - 1.0)
    })
}

pub(crate) fn lora() -> Step {
    let x = spread(TOKENS, WIDTH, 1.0);
    let base = spread(WIDTH, WIDTH, 0.05);
    let a = spread(RANK, WIDTH, 0.05);
    let b = spread(WIDTH, RANK, 0.05);
    let upstream = spread(TOKENS, WIDTH, 1.0);
    let scale = 2.0;
    Box::new(move || {
        let latent = x.dot(&a.t());
        let mut output = x.dot(&base.t());
        output.scaled_add(scale, &latent.dot(&b.t()));
        let latent_gradient = upstream.dot(&b) * scale;
        let b_gradient = upstream.t().dot(&latent) * scale;
        let a_gradient = latent_gradient.t().dot(&x);
        let mut x_gradient = upstream.dot(&base);
        x_gradient += &latent_gradient.dot(&a);
        Ok(output.sum() + a_gradient.sum() + b_gradient.sum() + x_gradient.sum())
    })
}
