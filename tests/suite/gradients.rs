//! The gradient of every operation against central differences, in f64 on the reference, in the middle of a graph.

use libtest_mimic::{Failed, Trial};
use rankmix::{DType, Device, Tensor};

use crate::case::Case;
use crate::cases;
use crate::metrics::relative_errors;

/// The step of the differences: the error of their formula is its square, that of rounding 1e-16 over it.
const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 1e-6;

fn check(case: &Case) -> Result<(), Failed> {
    let mut harness = case.compile(&Device::reference())?;
    let results = harness.run()?;
    let gradients = &results[harness.outputs.len()..];
    let floats = case
        .inputs
        .iter()
        .enumerate()
        .filter(|(_, tensor)| tensor.dtype() != DType::I32);
    for ((input, tensor), gradient) in floats.zip(gradients) {
        let values = tensor.to_f64();
        let mut differences = Vec::with_capacity(values.len());
        for element in 0..values.len() {
            let mut loss_at = |delta: f64| {
                let mut moved = values.clone();
                moved[element] += delta;
                harness.loss_with(input, &Tensor::f64(tensor.shape(), moved)?)
            };
            differences.push((loss_at(STEP)? - loss_at(-STEP)?) / (2.0 * STEP));
        }
        harness.loss_with(input, tensor)?;
        let (error, _) = relative_errors(&gradient.to_f64(), &differences);
        if error.is_nan() || error > TOLERANCE {
            return Err(format!(
                "input {input}: relative error {error:.2e} against central differences"
            )
            .into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    cases::all()
        .into_iter()
        .filter(|case| case.differentiable)
        .map(|case| Trial::test(format!("gradients::{}", case.name), move || check(&case)))
        .collect()
}
