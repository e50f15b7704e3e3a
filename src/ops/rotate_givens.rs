//! The chain of plane rotations over all pairs of coordinates, one after another.

use crate::device::{Capabilities, Launch, Slot};
use crate::error::Result;
use crate::ops::rotation::{Kind, RowGradient};
use crate::ops::{Real, Rotation, shader};

/// Words of workgroup memory: the 16,384 bytes that WebGPU promises everywhere.
pub(crate) const WORKGROUP_WORDS: usize = 4096;

/// As many rows as fit workgroup memory with so many arrays, at most 64.
fn workgroup(rank: usize, arrays: usize) -> usize {
    (WORKGROUP_WORDS / (rank * arrays)).clamp(1, 64)
}

/// The pairs of coordinates, in the order of the chain.
fn pairs(rank: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
    (0..rank).flat_map(move |a| (a + 1..rank).map(move |b| (a, b)))
}

/// Plane rotations of a row, one after another: each pair of coordinates by its angle.
pub(crate) fn rotate_chain<R: Real>(
    pairs: impl Iterator<Item = (usize, usize)>,
    z: &[R],
    angles: &[R],
    y: &mut [R],
) {
    y.copy_from_slice(z);
    for ((a, b), &angle) in pairs.zip(angles) {
        // 1 z - 0 z' would lose the sign of a zero.
        if angle != R::zero() {
            let (sin, cos) = angle.sin_cos();
            (y[a], y[b]) = (cos * y[a] - sin * y[b], sin * y[a] + cos * y[b]);
        }
    }
}

/// The gradient of [`rotate_chain`]: from the last pair to the first, each rotation is undone on the result and on its gradient.
pub(crate) fn chain_gradient<R: Real>(
    pairs: impl DoubleEndedIterator<Item = (usize, usize)>,
    row: RowGradient<'_, R>,
    dz: &mut [R],
    d_angles: &mut [R],
) {
    let mut y = row.y.to_vec();
    dz.copy_from_slice(row.dy);
    let angles = row.generator.iter().zip(d_angles).rev();
    for ((a, b), (&angle, d_angle)) in pairs.rev().zip(angles) {
        let (sin, cos) = angle.sin_cos();
        *d_angle = dz[b] * y[a] - dz[a] * y[b];
        (y[a], y[b]) = (cos * y[a] + sin * y[b], cos * y[b] - sin * y[a]);
        (dz[a], dz[b]) = (cos * dz[a] + sin * dz[b], cos * dz[b] - sin * dz[a]);
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Givens;

impl Kind for Givens {
    /// Backward has y and its gradient in workgroup memory, for one row at least.
    const MAX_RANK: usize = WORKGROUP_WORDS / 2;
    const KEEPS_INPUT: bool = false;

    fn rotation(self) -> Rotation {
        Rotation::Givens
    }

    fn names(self) -> [&'static str; 2] {
        ["rotate_givens", "rotate_givens_backward"]
    }

    fn rotate<R: Real>(self, z: &[R], generator: &[R], y: &mut [R]) {
        rotate_chain(pairs(z.len()), z, generator, y);
    }

    fn gradient<R: Real>(self, row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]) {
        chain_gradient(pairs(row.y.len()), row, dz, d_generator);
    }

    fn forward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let workgroup = workgroup(rank, 1);
        let launch = Launch::new(shader!("rotate_givens", "cos_sin"), "forward")
            .constant("WORKGROUP", workgroup as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0))
            .param(rows);
        launch.folded(rows.div_ceil(workgroup), capabilities)
    }

    fn backward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let workgroup = workgroup(rank, 2);
        let launch = Launch::new(shader!("rotate_givens", "cos_sin"), "backward")
            .constant("WORKGROUP", workgroup as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .param(rows);
        launch.folded(rows.div_ceil(workgroup), capabilities)
    }
}
