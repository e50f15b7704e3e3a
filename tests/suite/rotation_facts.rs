//! What every rotation must be, whatever its kind: orthogonal, of determinant 1, the identity for a generator of 0.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{AdapterOptions, GateInput, Linear, RotMole, Routing};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType};

use crate::case::{floats, floats_in};
use crate::devices;

fn rotate(
    device: &Device,
    rotation: Rotation,
    z: &Tensor,
    generator: &Tensor,
) -> rankmix::Result<Tensor> {
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

/// Sine and cosine against f64: planes turn the unit vector (1, 0) into (cos, sin). Angles up to 1e4 of both signs, beside every edge and
/// every middle of a quadrant, where the kernels change from one polynomial to the other.
fn cos_sin_is_right(device: &Device) -> Result<(), Failed> {
    let eighth = std::f64::consts::FRAC_PI_4;
    let edges = (0..12_732)
        .map(|k| (f64::from(k) * eighth) as f32)
        .flat_map(|edge| [edge.next_down(), edge, edge.next_up()]);
    let ramp = (0..20_000).map(|k| k as f32 * 0.499_987);
    let angles: Vec<f32> = edges
        .chain(ramp)
        .flat_map(|angle| [angle, -angle])
        .chain([1e4, -1e4, 1e-6, -1e-30])
        .collect();
    let rows = angles.len();
    let z = Tensor::f32([rows, 2], [1.0, 0.0].repeat(rows))?;
    let generator = Tensor::f32([rows, 1], angles.clone())?;
    let y = rotate(device, Rotation::Planes, &z, &generator)?.to_f64();
    for (&angle, y) in angles.iter().zip(y.chunks(2)) {
        let (sin, cos) = f64::from(angle).sin_cos();
        let error = (y[0] - cos).abs().max((y[1] - sin).abs());
        if error.is_nan() || error > 1.5e-7 {
            return Err(format!("off by {error:.2e} at {angle}").into());
        }
    }
    Ok(())
}

/// tanh, which bounds generators, against f64: of each value, from the smallest to where it is 1.
fn tanh_is_right(device: &Device) -> Result<(), Failed> {
    let values: Vec<f32> = (-120..=60)
        .map(|k| 2.0_f32.powf(k as f32 / 4.0))
        .chain((0..4000).map(|k| k as f32 * 0.003))
        .flat_map(|x| [x, -x])
        .chain([0.7_f32.next_down(), 0.7, 1e30, -3e38])
        .collect();
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([values.len()]))?;
    let y = graph.tanh(x)?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::f32([values.len()], values.clone())?)?;
    let y = session.run_reading(&[y])?.remove(0).to_f64();
    for (&x, y) in values.iter().zip(y) {
        let want = f64::from(x).tanh();
        let error = (y - want).abs();
        if error.is_nan() || error > 2.5e-7 * want.abs() {
            return Err(format!("tanh {x} is {y}, not {want}").into());
        }
    }
    Ok(())
}

/// A direction of length 0 has no reflection: what is left is the other one. At rank 4 u starts as (1, 1, 1, 1) / 2.
fn a_reflection_along_nothing_is_left_out(device: &Device) -> Result<(), Failed> {
    let z = floats(&[1, 4], 204);
    let v = [0.25, -1.0, 0.5, 2.0];
    for (a, v, direction) in [([0.0; 4], [-0.5; 4], [0.5; 4]), ([-0.5; 4], v, v)] {
        let generator = Tensor::f32([1, 8], [a, v].concat())?;
        let y = rotate(device, Rotation::Householder, &z, &generator)?.to_f64();
        let direction = direction.map(f64::from);
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let z = z.to_f64();
        let along = 2.0 * product(&direction, &z) / product(&direction, &direction);
        for ((y, z), direction) in y.iter().zip(z).zip(direction) {
            let error = (y - (z - along * direction)).abs();
            if error.is_nan() || error > 1e-6 {
                return Err(format!("a coordinate is off by {error:.2e}").into());
            }
        }
    }
    Ok(())
}

/// What a layer says it has rotated, rotated by what it says, gives what it says.
fn a_layer_shows_its_rotations(
    device: &Device,
    gate_input: GateInput,
    bounded: bool,
) -> Result<(), Failed> {
    let (tokens, experts, top_k, rank) = (7, 3, 2, 4);
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([tokens, 5]))?;
    let mut layer = RotMole::with_rotation(
        Linear::new("layer", 5, 6),
        AdapterOptions::new(rank, 2.0),
        Routing::new(experts, top_k),
        Rotation::Givens,
        gate_input,
    )?;
    layer.bounded = bounded;
    let routed = layer.forward(&mut graph, x)?;
    let shown = routed.rotated.ok_or("the layer shows no rotations")?;
    let chosen = routed.routed.experts();
    let outputs = [shown.before, shown.after, shown.generator, chosen];
    for value in outputs {
        graph.output(value)?;
    }
    let store = ParameterStore::new(device);
    store.initialize(&graph, 3)?;
    for (name, seed) in [("rotation_gate", 210), ("rotation_generator", 211)] {
        let name = format!("layer.{name}");
        if let Some(ty) = store.ty(&name) {
            store.insert(&name, &floats(ty.dims(), seed))?;
        }
    }
    let mut session = graph.compile(&store)?;
    session.write(x, &floats(&[tokens, 5], 212))?;
    let results = session.run_reading(&outputs)?;
    let numbers = results[2].shape().last();
    let generators = results[2].to_f64();
    // An expert's own rotation, once for each pair.
    let generators = match gate_input {
        GateInput::Static => {
            let chosen = results[3].as_i32().ok_or("experts are integers")?;
            let rows = chosen.iter().map(|&expert| expert as usize * numbers);
            rows.flat_map(|row| generators[row..row + numbers].to_vec())
                .collect()
        }
        GateInput::Input | GateInput::Latent => generators,
    };
    if generators.iter().all(|number| number.abs() < 1e-3) {
        return Err("nothing was rotated".into());
    }
    let generators = Tensor::f64([tokens * top_k, numbers], generators)?;
    let want = rotate(
        &Device::reference(),
        Rotation::Givens,
        &results[0],
        &generators,
    )?;
    for (got, want) in results[1].to_f64().iter().zip(want.to_f64()) {
        let error = (got - want).abs();
        if error.is_nan() || error > 1e-5 {
            return Err(format!("a coordinate is off by {error:.2e}").into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for gate_input in [GateInput::Input, GateInput::Latent, GateInput::Static] {
        for bounded in [false, true] {
            let bound = if bounded { "_bounded" } else { "" };
            trials.extend(devices::trials(
                &format!("rotation::a_layer_shows_its_rotations_{gate_input}{bound}"),
                move |device| a_layer_shows_its_rotations(device, gate_input, bounded),
            ));
        }
    }
    for rotation in Rotation::ALL {
        for rank in [2, 5, 6, 16, 33, 64] {
            if rotation.numbers(rank).is_err() {
                continue;
            }
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
    let deep = Rotation::BrickWall { layers: 64 };
    let angles = [
        (Rotation::Planes, 8),
        (Rotation::Givens, 8),
        (Rotation::Givens, 64),
        (Rotation::Butterfly, 8),
        (Rotation::Butterfly, 64),
        (Rotation::BrickWall { layers: 4 }, 8),
        (deep, 64),
    ];
    for (rotation, rank) in angles {
        let name = format!("rotation::{rotation}_keeps_lengths_for_angles_to_1e4_rank_{rank}");
        trials.extend(devices::trials(&name, move |device| {
            lengths_are_kept(device, rotation, rank, 1e4)
        }));
    }
    trials.extend(devices::trials(
        "rotation::cos_sin_is_right",
        cos_sin_is_right,
    ));
    trials.extend(devices::trials("rotation::tanh_is_right", tanh_is_right));
    trials.extend(devices::trials(
        "rotation::a_reflection_along_nothing_is_left_out",
        a_reflection_along_nothing_is_left_out,
    ));
    trials
}
