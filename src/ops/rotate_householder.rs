//! A pair of Householder reflections, `y = H(u + v) H(u) z`: one rotation in the plane of u and v, by twice the angle between u and u + v.

use crate::device::{Capabilities, Launch, Slot};
use crate::error::Result;
use crate::ops::rotation::{Kind, RowGradient};
use crate::ops::spread::barrier_workgroup;
use crate::ops::{Real, Rotation, shader};

const WORKGROUP: usize = 64;

/// A direction whose square is not above this has no reflection: H is then the identity. As in `shaders/rotate_householder.wgsl`.
const TINY: f64 = 1e-30;

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// `2 / w·w`, 0 for a direction that has no reflection.
fn factor<R: Real>(w: &[R]) -> R {
    let square = dot(w, w);
    if square > R::of(TINY) {
        R::of(2.0) / square
    } else {
        R::zero()
    }
}

/// `H(w) x`.
fn reflect<R: Real>(w: &[R], x: &[R]) -> Vec<R> {
    let along = factor(w) * dot(w, x);
    x.iter().zip(w).map(|(&x, &w)| x - along * w).collect()
}

/// The gradient of `w` in `y = H(w) x`, from the result and its gradient.
fn direction_gradient<R: Real>(w: &[R], y: &[R], dy: &[R]) -> Vec<R> {
    let factor = factor(w);
    let (along, along_gradient) = (factor * dot(w, y), factor * dot(w, dy));
    y.iter()
        .zip(dy)
        .map(|(&y, &dy)| along * dy - along_gradient * y)
        .collect()
}

/// Every coordinate of what u is for a = 0, a unit vector.
fn start(rank: usize) -> f64 {
    1.0 / (rank as f64).sqrt()
}

/// `u` and `w = u + v`.
fn directions<R: Real>(generator: &[R]) -> (Vec<R>, Vec<R>) {
    let (a, v) = generator.split_at(generator.len() / 2);
    let start = start(a.len());
    let u: Vec<R> = a.iter().map(|&a| R::of(start) + a).collect();
    let w = u.iter().zip(v).map(|(&u, &v)| u + v).collect();
    (u, w)
}

/// Whether `v` is 0, so that the two reflections undo each other.
fn is_still<R: Real>(generator: &[R]) -> bool {
    let v = &generator[generator.len() / 2..];
    v.iter().all(|&v| v == R::zero())
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Householder;

impl Householder {
    fn launch(entry: &'static str, rank: usize, capabilities: &Capabilities) -> (Launch, usize) {
        let workgroup = barrier_workgroup(WORKGROUP, capabilities);
        let lanes = rank.next_power_of_two().min(workgroup);
        let launch = Launch::new(shader!("rotate_householder"), entry)
            .constant("WORKGROUP", workgroup as f64)
            .constant("LANES", lanes as f64);
        (launch, workgroup / lanes)
    }
}

impl Kind for Householder {
    const MAX_RANK: usize = usize::MAX;
    const KEEPS_INPUT: bool = false;

    fn rotation(self) -> Rotation {
        Rotation::Householder
    }

    fn names(self) -> [&'static str; 2] {
        ["rotate_householder", "rotate_householder_backward"]
    }

    fn rotate<R: Real>(self, z: &[R], generator: &[R], y: &mut [R]) {
        if is_still(generator) {
            y.copy_from_slice(z);
            return;
        }
        let (u, w) = directions(generator);
        y.copy_from_slice(&reflect(&w, &reflect(&u, z)));
    }

    fn gradient<R: Real>(self, row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]) {
        let (u, w) = directions(row.generator);
        // Each reflection undoes itself.
        let (t, dt) = (reflect(&w, row.y), reflect(&w, row.dy));
        if is_still(row.generator) {
            dz.copy_from_slice(row.dy);
        } else {
            dz.copy_from_slice(&reflect(&u, &dt));
        }
        let dw = direction_gradient(&w, row.y, row.dy);
        let du = direction_gradient(&u, &t, &dt);
        let (d_a, d_v) = d_generator.split_at_mut(u.len());
        for ((d_a, du), &dw) in d_a.iter_mut().zip(du).zip(&dw) {
            *d_a = du + dw;
        }
        d_v.copy_from_slice(&dw);
    }

    fn forward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let (launch, rows_per_group) = Self::launch("forward", rank, capabilities);
        let launch = launch
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0))
            .param(rows)
            .param(rank)
            .param(start(rank) as f32);
        launch.folded(rows.div_ceil(rows_per_group), capabilities)
    }

    fn backward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let (launch, rows_per_group) = Self::launch("backward", rank, capabilities);
        let launch = launch
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .param(rows)
            .param(rank)
            .param(start(rank) as f32);
        launch.folded(rows.div_ceil(rows_per_group), capabilities)
    }
}
