//! Rotations in planes: one angle for each pair of neighbouring coordinates.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::Backward;
use crate::host_reference;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Rotation, expect_count, shader};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Inputs: z `[rows, rank]`, generator `[rows, numbers]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotatePlanes;

/// Inputs: y (the gradient needs only the output, z is not kept), generator, dy. Outputs: dz, the gradient of the generator.
#[derive(Clone, Copy, Debug)]
struct RotatePlanesBackward;

impl RotatePlanes {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let numbers = io.input_type(1)?.shape.last();
        let (z, generator) = (io.floats(0)?, io.floats(1)?);
        let y = io.floats_out(0)?;
        let rows = y.par_chunks_mut(rank).zip(z.par_chunks(rank)).zip(generator.par_chunks(numbers));
        rows.for_each(|((y, z), p)| {
            for ((y, z), &angle) in y.chunks_mut(2).zip(z.chunks(2)).zip(p) {
                let (sin, cos) = angle.sin_cos();
                y[0] = cos * z[0] - sin * z[1];
                y[1] = sin * z[0] + cos * z[1];
            }
        });
        Ok(())
    }
}

impl Op for RotatePlanes {
    fn name(&self) -> &'static str {
        "rotate_planes"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        Rotation::Planes.sizes(self.name(), inputs)?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else { return Ok(()) };
        let inputs = [context.output(0), context.input(1), dy];
        let gradients = context.graph.apply(RotatePlanesBackward, &inputs)?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Planes.sizes(self.name(), io.inputs)?;
        let pairs = rows * rank / 2;
        let launch = Launch::new(shader!("rotate_planes", "cos_sin"), "forward")
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0))
            .param(pairs)
            .folded(pairs.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl RotatePlanesBackward {
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
            for (pair, (&angle, dp)) in p.iter().zip(dp).enumerate() {
                let (a, b) = (2 * pair, 2 * pair + 1);
                let (sin, cos) = angle.sin_cos();
                dz[a] = cos * dy[a] + sin * dy[b];
                dz[b] = cos * dy[b] - sin * dy[a];
                *dp = dy[b] * y[a] - dy[a] * y[b];
            }
        });
        Ok(())
    }
}

impl Op for RotatePlanesBackward {
    fn name(&self) -> &'static str {
        "rotate_planes_backward"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Rotation::Planes.backward_types(self.name(), inputs, 3)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = Rotation::Planes.sizes(self.name(), io.inputs)?;
        let pairs = rows * rank / 2;
        let launch = Launch::new(shader!("rotate_planes", "cos_sin"), "backward")
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .param(pairs)
            .folded(pairs.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
