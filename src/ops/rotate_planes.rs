//! Rotations in planes: one angle for each pair of neighbouring coordinates.

use crate::device::{Capabilities, Launch, Slot};
use crate::error::Result;
use crate::ops::rotation::{Kind, RowGradient};
use crate::ops::{Real, Rotation, element_wise, shader};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes;

/// The kernel that rotates so many pairs of coordinates: z by its angles into y.
pub(crate) fn rotate(
    pairs: usize,
    [z, angles]: [Slot; 2],
    y: Slot,
    capabilities: &Capabilities,
) -> Result<Launch> {
    let launch = Launch::new(shader!("rotate_planes", "cos_sin", "rotate_two"), "forward")
        .read(1, angles)
        .read(2, z)
        .write(4, y)
        .param(pairs);
    element_wise(launch, 2 * pairs, capabilities)
}

impl Kind for Planes {
    const MAX_RANK: usize = usize::MAX;
    const KEEPS_INPUT: bool = false;

    fn rotation(self) -> Rotation {
        Rotation::Planes
    }

    fn names(self) -> [&'static str; 2] {
        ["rotate_planes", "rotate_planes_backward"]
    }

    fn rotate<R: Real>(self, z: &[R], generator: &[R], y: &mut [R]) {
        for ((y, z), &angle) in y.chunks_mut(2).zip(z.chunks(2)).zip(generator) {
            if angle == R::zero() {
                // 1 z - 0 z' would lose the sign of a zero.
                y.copy_from_slice(z);
                continue;
            }
            let (sin, cos) = angle.sin_cos();
            y[0] = cos * z[0] - sin * z[1];
            y[1] = sin * z[0] + cos * z[1];
        }
    }

    fn gradient<R: Real>(self, row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]) {
        let RowGradient {
            generator, y, dy, ..
        } = row;
        for (pair, (&angle, d_angle)) in generator.iter().zip(d_generator).enumerate() {
            let (a, b) = (2 * pair, 2 * pair + 1);
            let (sin, cos) = angle.sin_cos();
            dz[a] = cos * dy[a] + sin * dy[b];
            dz[b] = cos * dy[b] - sin * dy[a];
            *d_angle = dy[b] * y[a] - dy[a] * y[b];
        }
    }

    fn forward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let (z, angles) = (Slot::Input(0), Slot::Input(1));
        rotate(rows * rank / 2, [z, angles], Slot::Output(0), capabilities)
    }

    fn backward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let pairs = rows * rank / 2;
        let launch = Launch::new(
            shader!("rotate_planes", "cos_sin", "rotate_two"),
            "backward",
        )
        .read(1, Slot::Input(1))
        .read(2, Slot::Input(0))
        .read(3, Slot::Input(2))
        .write(4, Slot::Output(0))
        .write(5, Slot::Output(1))
        .param(pairs);
        element_wise(launch, 2 * pairs, capabilities)
    }
}
