//! The Cayley transform of a skew-symmetric matrix: `y = (I - Q)⁻¹ (I + Q) z`, one small linear system a row.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::Backward;
use crate::host_reference;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Rotation, expect_count, shader};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;
/// The largest matrix in the 16,384 bytes of workgroup memory that WebGPU promises everywhere.
const MAX_RANK: usize = 64;

/// Invocations that share the rows of the matrix; the others take its columns.
fn lanes(rank: usize) -> usize {
    rank.next_power_of_two().min(WORKGROUP)
}

fn rank_limit(z: &TensorType) -> Result<()> {
    let rank = z.shape.last();
    if rank <= MAX_RANK {
        return Ok(());
    }
    Err(Error::Limit {
        thing: "a Cayley rotation".to_owned(),
        needed: rank as u64,
        limit: MAX_RANK as u64,
        unit: "dimensions",
    })
}

/// The solution of `(I - sign Q) x = right`, by elimination without pivots: the symmetric part of the matrix is I.
fn solve<R: Real>(generator: &[R], right: &[R], sign: R) -> Vec<R> {
    let rank = right.len();
    let mut matrix = vec![R::zero(); rank * rank];
    let mut pair = 0;
    for a in 0..rank {
        matrix[a * rank + a] = R::one();
        for b in a + 1..rank {
            matrix[a * rank + b] = -sign * generator[pair];
            matrix[b * rank + a] = sign * generator[pair];
            pair += 1;
        }
    }
    let mut x = right.to_vec();
    for k in 0..rank {
        for i in k + 1..rank {
            let factor = matrix[i * rank + k] / matrix[k * rank + k];
            for j in k + 1..rank {
                let above = matrix[k * rank + j];
                matrix[i * rank + j] -= factor * above;
            }
            let above = x[k];
            x[i] -= factor * above;
        }
    }
    for k in (0..rank).rev() {
        let known: R = (k + 1..rank).map(|j| matrix[k * rank + j] * x[j]).sum();
        x[k] = (x[k] - known) / matrix[k * rank + k];
    }
    x
}

/// Inputs: z `[rows, rank]`, generator `[rows, numbers]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotateCayley;

/// Inputs: z, generator, y, dy. Outputs: dz, the gradient of the generator.
#[derive(Clone, Copy, Debug)]
struct RotateCayleyBackward;

impl RotateCayley {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let numbers = io.input_type(1)?.shape.last();
        let (z, generator) = (io.floats(0)?, io.floats(1)?);
        let y = io.floats_out(0)?;
        let rows = y.par_chunks_mut(rank).zip(z.par_chunks(rank)).zip(generator.par_chunks(numbers));
        rows.for_each(|((y, z), p)| {
            let w = solve(p, z, R::one());
            for ((y, &w), &z) in y.iter_mut().zip(&w).zip(z) {
                *y = w + w - z;
            }
        });
        Ok(())
    }
}

impl Op for RotateCayley {
    fn name(&self) -> &'static str {
        "rotate_cayley"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        Rotation::Cayley.sizes(self.name(), inputs)?;
        rank_limit(&inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else { return Ok(()) };
        let inputs = [context.input(0), context.input(1), context.output(0), dy];
        let gradients = context.graph.apply(RotateCayleyBackward, &inputs)?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Cayley.sizes(self.name(), io.inputs)?;
        let launch = Launch::new(shader!("rotate_cayley"), "forward")
            .constant("LANES", lanes(rank) as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(5, Slot::Output(0))
            .param(rows)
            .folded(rows, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl RotateCayleyBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let numbers = io.input_type(1)?.shape.last();
        let (z, generator, y, dy) = (io.floats(0)?, io.floats(1)?, io.floats(2)?, io.floats(3)?);
        let (dz, d_generator) = (io.floats_out(0)?, io.floats_out(1)?);
        let outputs = dz.par_chunks_mut(rank).zip(d_generator.par_chunks_mut(numbers)).enumerate();
        outputs.for_each(|(row, (dz, dp))| {
            let here = row * rank..(row + 1) * rank;
            let (z, y, dy) = (&z[here.clone()], &y[here.clone()], &dy[here]);
            let p = &generator[row * numbers..(row + 1) * numbers];
            let v = solve(p, dy, -R::one());
            let w: Vec<R> = y.iter().zip(z).map(|(&y, &z)| R::of(0.5) * (y + z)).collect();
            for ((dz, &v), &dy) in dz.iter_mut().zip(&v).zip(dy) {
                *dz = v + v - dy;
            }
            let pairs = (0..rank).flat_map(|a| (a + 1..rank).map(move |b| (a, b)));
            for ((a, b), dp) in pairs.zip(dp) {
                *dp = R::of(2.0) * (v[a] * w[b] - v[b] * w[a]);
            }
        });
        Ok(())
    }
}

impl Op for RotateCayleyBackward {
    fn name(&self) -> &'static str {
        "rotate_cayley_backward"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Rotation::Cayley.backward_types(self.name(), inputs, 4)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Cayley.sizes(self.name(), io.inputs)?;
        let launch = Launch::new(shader!("rotate_cayley"), "backward")
            .constant("LANES", lanes(rank) as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(3))
            .read(3, Slot::Input(0))
            .read(4, Slot::Input(2))
            .write(5, Slot::Output(0))
            .write(6, Slot::Output(1))
            .param(rows)
            .folded(rows, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
