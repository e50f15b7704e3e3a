//! Rotations.

use rankmix::Tensor;
use rankmix::ops::Rotation;

use crate::case::{Case, floats, floats_in};

fn case(rotation: Rotation, rows: usize, rank: usize, spread: f64) -> Case {
    let numbers = rotation
        .numbers(rank)
        .expect("the ranks below suit the rotations");
    let inputs = vec![
        floats(&[rows, rank], 70),
        floats_in(&[rows, numbers], 71, -spread, spread),
    ];
    let name = format!("rotate_{rotation}_{rows}_{rank}_{spread}");
    Case::new(name, inputs, move |g, v| {
        Ok(vec![g.rotate(rotation, v[0], v[1])?])
    })
}

/// Both directions, for sizes at which central differences would take too long.
fn large(rotation: Rotation, rows: usize, rank: usize, spread: f64) -> Case {
    let numbers = rotation
        .numbers(rank)
        .expect("the ranks below suit the rotations");
    let inputs = vec![
        floats(&[rows, rank], 72),
        floats_in(&[rows, numbers], 73, -spread, spread),
        floats(&[rows, rank], 74),
    ];
    let name = format!("rotate_{rotation}_{rows}_{rank}_{spread}_both_ways");
    let build = move |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
        let y = g.rotate(rotation, v[0], v[1])?;
        let mut results = g.gradients_from(&[(y, v[2])], &v[..2])?;
        results.push(y);
        Ok(results)
    };
    Case::new(name, inputs, build).forward_only()
}

/// The gradient where training starts: the generator reaches the rotation as exactly 0.
fn at_zero(rotation: Rotation) -> Case {
    let (rows, rank) = (2, 4);
    let numbers = rotation
        .numbers(rank)
        .expect("every kind of rotation has rank 4");
    let halves = Tensor::f64([rows, numbers], vec![0.5; rows * numbers]).expect("as many halves");
    let inputs = vec![floats(&[rows, rank], 76), halves];
    let name = format!("rotate_{rotation}_at_zero");
    Case::new(name, inputs, move |g, v| {
        // 0.5 is fed as 1.25 * 0.5 - 0.125 = 0.5.
        let zero = g.affine(v[1], 1.0, -0.5)?;
        Ok(vec![g.rotate(rotation, v[0], zero)?])
    })
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for rotation in Rotation::ALL {
        for (rows, rank, spread) in [(1, 2, 3.0), (3, 4, 1.0), (2, 6, 2.0), (7, 2, 10.0)] {
            cases.push(case(rotation, rows, rank, spread));
        }
        for (rows, rank, spread) in [(133, 16, 1.0), (2, 64, 0.3), (70, 8, 3.0), (1, 32, 0.5)] {
            cases.push(large(rotation, rows, rank, spread));
        }
        cases.push(at_zero(rotation));
        if rotation != Rotation::Planes {
            cases.push(case(rotation, 2, 3, 1.0));
            cases.push(case(rotation, 3, 5, 1.0));
            cases.push(large(rotation, 7, 33, 0.3));
            cases.push(large(rotation, 3, 63, 0.3));
        }
    }
    // One layer alone, more layers than coordinates, and layers without a pair.
    for (layers, rank) in [(1, 5), (9, 4), (3, 2)] {
        cases.push(case(Rotation::BrickWall { layers }, 3, rank, 2.0));
    }
    cases.push(large(Rotation::Planes, 5, 130, 3.0));
    // More than a workgroup takes, and an odd number of pairs.
    cases.push(large(Rotation::Planes, 131, 38, 3.0));
    cases.push(large(Rotation::Givens, 2, 100, 0.2));
    // More coordinates than the invocations of a workgroup take in one go.
    cases.push(large(Rotation::Butterfly, 3, 131, 1.0));
    cases.push(large(Rotation::BrickWall { layers: 3 }, 3, 300, 1.0));
    cases.push(large(Rotation::Householder, 3, 131, 1.0));
    // Far outside [-pi, pi]. The angles 1.25 x - 0.125 are exact in f32, so that every device rotates by the same.
    let angles: Vec<f64> = (0..64).map(|i| f64::from(i * i * 2 - 4000) + 0.5).collect();
    let far = Tensor::f64([8, 8], angles).expect("64 angles");
    cases.push(
        Case::new(
            "rotate_planes_far_angles",
            vec![floats(&[8, 16], 75), far],
            |g, v| {
                let y = g.rotate(Rotation::Planes, v[0], v[1])?;
                Ok(vec![y])
            },
        )
        .forward_only(),
    );
    cases
}
