//! The gradient of a gated expand of latents that were rotated in planes: [`GateGradient`](super::gate_gradient::GateGradient) and the
//! rotation's, in one pass over the rank space.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Value};
use crate::host_reference;
use crate::ops::rotate_planes::Planes;
use crate::ops::rotation::{Kind, RowGradient};
use crate::ops::{
    GatedGradient, HostIo, LaunchTypes, Op, Real, Rotation, Work, dims_f32, expect_count,
    expect_f32, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Inputs: v `[pairs, rank]`, the rotated latents u `[pairs, rank]`, gates (one a pair), the angles `[pairs, rank / 2]`. Outputs: dz
/// `[pairs, rank]`, the gradient of the angles, d_gates `[pairs]`.
#[derive(Clone, Copy, Debug)]
struct RotatedGateGradient {
    scale: f32,
}

/// The gradients of what was rotated and of the angles, from a gradient of the rotated latents that is a gated expand's alone; the gates'
/// comes from the same kernel.
pub(crate) fn rotated_gate_gradient(
    context: &mut Backward<'_>,
    gated: GatedGradient,
    angles: Value,
) -> Result<[Value; 2]> {
    let GatedGradient {
        v,
        z,
        gates,
        scale,
        d_gates,
    } = gated;
    let inputs = [v, z, gates, angles];
    let gradients = context
        .graph
        .apply(RotatedGateGradient { scale }, &inputs)?;
    let shape = context.graph.ty(gates)?.shape.clone();
    let new = context.graph.reshape(gradients[2], shape)?;
    context.replace(d_gates, new);
    Ok([gradients[0], gradients[1]])
}

impl RotatedGateGradient {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let (v, u, gates, angles) = (io.floats(0)?, io.floats(1)?, io.floats(2)?, io.floats(3)?);
        let (dz, d_angles, d_gates) = (io.floats_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        let scale = R::of(f64::from(self.scale));
        let rows = dz
            .par_chunks_mut(rank)
            .zip(d_angles.par_chunks_mut(rank / 2))
            .zip(d_gates.par_iter_mut())
            .enumerate();
        rows.for_each(|(pair, ((dz, d_angles), d_gate))| {
            let here = pair * rank..(pair + 1) * rank;
            let (v, u) = (&v[here.clone()], &u[here]);
            *d_gate = scale * v.iter().zip(u).map(|(&v, &u)| v * u).sum::<R>();
            let du: Vec<R> = v.iter().map(|&v| scale * gates[pair] * v).collect();
            let row = RowGradient {
                generator: &angles[pair * (rank / 2)..][..rank / 2],
                y: u,
                dy: &du,
                z: &[],
            };
            Planes.gradient(row, dz, d_angles);
        });
        Ok(())
    }
}

impl Op for RotatedGateGradient {
    fn name(&self) -> &'static str {
        "rotated_gate_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [pairs, rank] = dims_f32(self.name(), "v", &io.inputs[0])?;
        let [_, rotation] = Rotation::Planes.flops(rank)?;
        Ok(Work::moving(io).with_flops(pairs * (3 * rank + 2 + rotation)))
    }

    /// Angles and gates are kept in f32, and so are their gradients.
    fn keeps_f32(&self, output: usize) -> bool {
        output > 0
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4)?;
        let [pairs, rank] = dims_f32(self.name(), "v", &inputs[0])?;
        expect_f32(self.name(), "the latents", &inputs[1], &[pairs, rank])?;
        expect_f32(self.name(), "the angles", &inputs[3], &[pairs, rank / 2])?;
        if inputs[2].elements() != pairs || !rank.is_multiple_of(2) {
            return Err(Error::shape(
                self.name(),
                format!(
                    "the gates are {} for {pairs} pairs of rank {rank}",
                    inputs[2]
                ),
            ));
        }
        Ok(vec![
            inputs[0].clone(),
            inputs[3].clone(),
            TensorType::f32([pairs]),
        ])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [pairs, rank] = dims_f32(self.name(), "v", &io.inputs[0])?;
        let launch = Launch::new(shader!("rotated_gate_gradient", "cos_sin"), "backward")
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(4, Slot::Input(3))
            .write(5, Slot::Output(0))
            .write(6, Slot::Output(1))
            .write(7, Slot::Output(2))
            .param(pairs)
            .param(rank / 2)
            .param(self.scale)
            .folded(pairs.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
