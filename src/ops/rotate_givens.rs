//! The chain of plane rotations over all pairs of coordinates, one after another.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::Backward;
use crate::host_reference;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Rotation, expect_count, shader};
use crate::tensor::TensorType;

/// Words of workgroup memory: the 16,384 bytes that WebGPU promises everywhere.
const WORKGROUP_WORDS: usize = 4096;

/// As many rows as fit workgroup memory with so many arrays, at most 64.
fn workgroup(rank: usize, arrays: usize) -> usize {
    (WORKGROUP_WORDS / (rank * arrays)).clamp(1, 64)
}

/// One row and its gradient must fit: backward has a workgroup for itself in the worst case.
fn rank_limit(z: &TensorType) -> Result<()> {
    let (rank, limit) = (z.shape.last(), WORKGROUP_WORDS / 2);
    if rank <= limit {
        return Ok(());
    }
    Err(Error::Limit {
        thing: "a Givens chain".to_owned(),
        needed: rank as u64,
        limit: limit as u64,
        unit: "dimensions",
    })
}

/// Inputs: z `[rows, rank]`, generator `[rows, numbers]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotateGivens;

/// Inputs: y (rotations are undone on the output, z is not kept), generator, dy. Outputs: dz, the gradient of the generator.
#[derive(Clone, Copy, Debug)]
struct RotateGivensBackward;

impl RotateGivens {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let numbers = io.input_type(1)?.shape.last();
        let (z, generator) = (io.floats(0)?, io.floats(1)?);
        let y = io.floats_out(0)?;
        let rows = y.par_chunks_mut(rank).zip(z.par_chunks(rank)).zip(generator.par_chunks(numbers));
        rows.for_each(|((y, z), p)| {
            y.copy_from_slice(z);
            let pairs = (0..rank).flat_map(|a| (a + 1..rank).map(move |b| (a, b)));
            for ((a, b), &angle) in pairs.zip(p) {
                let (sin, cos) = angle.sin_cos();
                (y[a], y[b]) = (cos * y[a] - sin * y[b], sin * y[a] + cos * y[b]);
            }
        });
        Ok(())
    }
}

impl Op for RotateGivens {
    fn name(&self) -> &'static str {
        "rotate_givens"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        Rotation::Givens.sizes(self.name(), inputs)?;
        rank_limit(&inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else { return Ok(()) };
        let inputs = [context.output(0), context.input(1), dy];
        let gradients = context.graph.apply(RotateGivensBackward, &inputs)?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Givens.sizes(self.name(), io.inputs)?;
        let workgroup = workgroup(rank, 1);
        let launch = Launch::new(shader!("rotate_givens", "cos_sin"), "forward")
            .constant("WORKGROUP", workgroup as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0))
            .param(rows)
            .folded(rows.div_ceil(workgroup), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl RotateGivensBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let numbers = io.input_type(1)?.shape.last();
        let (y, generator, dy) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let (dz, d_generator) = (io.floats_out(0)?, io.floats_out(1)?);
        let outputs = dz.par_chunks_mut(rank).zip(d_generator.par_chunks_mut(numbers)).enumerate();
        outputs.for_each(|(row, (dz, dp))| {
            let here = row * rank..(row + 1) * rank;
            let (y, dy) = (&y[here.clone()], &dy[here]);
            let p = &generator[row * numbers..(row + 1) * numbers];
            let mut y = y.to_vec();
            dz.copy_from_slice(dy);
            let pairs: Vec<(usize, usize)> = (0..rank).flat_map(|a| (a + 1..rank).map(move |b| (a, b))).collect();
            for ((&(a, b), &angle), dp) in pairs.iter().zip(p).zip(dp).rev() {
                let (sin, cos) = angle.sin_cos();
                *dp = dz[b] * y[a] - dz[a] * y[b];
                (y[a], y[b]) = (cos * y[a] + sin * y[b], cos * y[b] - sin * y[a]);
                (dz[a], dz[b]) = (cos * dz[a] + sin * dz[b], cos * dz[b] - sin * dz[a]);
            }
        });
        Ok(())
    }
}

impl Op for RotateGivensBackward {
    fn name(&self) -> &'static str {
        "rotate_givens_backward"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Rotation::Givens.backward_types(self.name(), inputs, 3)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Givens.sizes(self.name(), io.inputs)?;
        let workgroup = workgroup(rank, 2);
        let launch = Launch::new(shader!("rotate_givens", "cos_sin"), "backward")
            .constant("WORKGROUP", workgroup as f64)
            .constant("RANK", rank as f64)
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .param(rows)
            .folded(rows.div_ceil(workgroup), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
