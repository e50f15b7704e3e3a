//! What every rotation must be, whatever its kind: orthogonal, of determinant 1, the identity for a generator of 0.

use libtest_mimic::{Failed, Trial};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType};

use crate::case::{floats, floats_in};
use crate::devices;

fn rotate(device: &Device, rotation: Rotation, z: &Tensor, generator: &Tensor) -> Result<Tensor> {
    let mut graph = Graph::new();
    let z_value = graph.input("z", TensorType::f32(z.shape()))?;
    let generator_value = graph.input("generator", TensorType::f32(generator.shape()))?;
    let y = graph.rotate(rotation, z_value, generator_value)?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(z_value, z)?;
    session.write(generator_value, generator)?;
    Ok(session.run_reading(&[y])?.remove(0))
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn lengths_are_kept(
    device: &Device,
    rotation: Rotation,
    rank: usize,
    largest: f64,
) -> Result<(), Failed> {
    let rows = 9;
    let z = floats(&[rows, rank], 200);
    let generator = floats_in(&[rows, rotation.numbers(rank)?], 201, -largest, largest);
    let y = rotate(device, rotation, &z, &generator)?;
    for (z, y) in z.to_f64().chunks(rank).zip(y.to_f64().chunks(rank)) {
        let drift = (norm(y) / norm(z) - 1.0).abs();
        if drift.is_nan() || drift > 1e-6 {
            return Err(format!("a length changed by {drift:.2e} of itself").into());
        }
    }
    Ok(())
}

fn zero_is_the_identity(device: &Device, rotation: Rotation, rank: usize) -> Result<(), Failed> {
    let mut z = floats(&[5, rank], 202).to_f32();
    // Zeros of both signs, beside numbers of both signs.
    for (at, zero) in [(0, -0.0), (3, 0.0), (rank + 1, -0.0), (2 * rank, 0.0)] {
        z[at] = zero;
    }
    let numbers = rotation.numbers(rank)?;
    let generator = Tensor::f32([5, numbers], vec![0.0; 5 * numbers])?;
    let y = rotate(
        device,
        rotation,
        &Tensor::f32([5, rank], z.clone())?,
        &generator,
    )?;
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    if bits(&y.to_f32()) == bits(&z) {
        Ok(())
    } else {
        Err(format!("a generator of 0 made {y:?} of {z:?}").into())
    }
}

/// The determinant of a small matrix, by elimination with pivots.
fn determinant(mut matrix: Vec<Vec<f64>>) -> f64 {
    let mut product = 1.0;
    for k in 0..matrix.len() {
        let pivot = (k..matrix.len())
            .max_by(|&a, &b| matrix[a][k].abs().total_cmp(&matrix[b][k].abs()))
            .unwrap_or(k);
        if pivot != k {
            matrix.swap(pivot, k);
            product = -product;
        }
        product *= matrix[k][k];
        let above = matrix[k].clone();
        for row in &mut matrix[k + 1..] {
            let factor = row[k] / above[k];
            for (x, a) in row.iter_mut().zip(&above) {
                *x -= factor * a;
            }
        }
    }
    product
}

fn is_orthogonal(device: &Device, rotation: Rotation, rank: usize) -> Result<(), Failed> {
    // Row i is R e_i, column i of R: one generator for all of them.
    let unit = (0..rank * rank)
        .map(|at| if at / rank == at % rank { 1.0 } else { 0.0 })
        .collect();
    let numbers = rotation.numbers(rank)?;
    let one = floats_in(&[numbers], 203, -1.0, 1.0).to_f32();
    let generator = Tensor::f32([rank, numbers], one.repeat(rank))?;
    let columns = rotate(
        device,
        rotation,
        &Tensor::f32([rank, rank], unit)?,
        &generator,
    )?
    .to_f64();
    let columns: Vec<Vec<f64>> = columns.chunks(rank).map(<[f64]>::to_vec).collect();
    for (i, a) in columns.iter().enumerate() {
        for (j, b) in columns.iter().enumerate() {
            let product: f64 = a.iter().zip(b).map(|(x, y)| x * y).sum();
            let error = (product - if i == j { 1.0 } else { 0.0 }).abs();
            if error.is_nan() || error > 3e-6 {
                return Err(format!("columns {i} and {j}: off by {error:.2e}").into());
            }
        }
    }
    let error = (determinant(columns) - 1.0).abs();
    if error.is_nan() || error > 1e-5 {
        Err(format!("the determinant is off by {error:.2e}").into())
    } else {
        Ok(())
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for rotation in Rotation::ALL {
        for rank in [2, 6, 16, 64] {
            let name = |fact: &str| format!("rotation::{rotation}_{fact}_rank_{rank}");
            trials.extend(devices::trials(&name("keeps_lengths"), move |device| {
                lengths_are_kept(device, rotation, rank, 1.0)
            }));
            trials.extend(devices::trials(
                &name("of_zero_is_the_identity"),
                move |device| zero_is_the_identity(device, rotation, rank),
            ));
            trials.extend(devices::trials(&name("is_orthogonal"), move |device| {
                is_orthogonal(device, rotation, rank)
            }));
        }
    }
    for rotation in [Rotation::Planes, Rotation::Givens] {
        let name = format!("rotation::{rotation}_keeps_lengths_for_angles_to_1e4");
        trials.extend(devices::trials(&name, move |device| {
            lengths_are_kept(device, rotation, 8, 1e4)
        }));
    }
    trials
}
