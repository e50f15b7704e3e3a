//! The gradient of a gated expand in rank space: `dz = s g v` and `dg = s <v, z>`, with `v = Wᵀ dy`.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks, items_per_chunk};
use crate::ops::host_sum::sum_of;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32, shader};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// Inputs: v `[pairs, rank]`, z `[pairs, rank]`, gates (one a pair). Outputs: dz `[pairs, rank]`, d_gates `[pairs]`.
#[derive(Clone, Copy, Debug)]
struct GateGradient {
    scale: f32,
}

/// What the gradient of latents is made of: `dz = scale gates v`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatedGradient {
    pub(crate) v: Value,
    /// The latents.
    pub(crate) z: Value,
    pub(crate) gates: Value,
    pub(crate) scale: f32,
    /// The gates' gradient, which is made with it.
    pub(crate) d_gates: Value,
}

impl Graph {
    /// `[dz, d_gates]`, shaped as `z` and as the gates, from `v = Wᵀ dy`. Whoever is given dz can look up in `gated` what it is made of,
    /// and make it in a kernel of their own.
    pub(crate) fn gate_gradient(
        &mut self,
        v: Value,
        z: Value,
        gates: Value,
        scale: f32,
    ) -> Result<[Value; 2]> {
        let outputs = self.apply(GateGradient { scale }, &[v, z, gates])?;
        let shape = self.ty(gates)?.shape.clone();
        let d_gates = self.reshape(outputs[1], shape)?;
        let made_of = GatedGradient {
            v,
            z,
            gates,
            scale,
            d_gates,
        };
        self.gated.insert(outputs[0], made_of);
        Ok([outputs[0], d_gates])
    }
}

impl GateGradient {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let (v, z, gates) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let (dz, d_gates) = (io.floats_out(0)?, io.floats_out(1)?);
        let scale = R::of(f64::from(self.scale));
        let per_chunk = items_per_chunk(LIGHT_CHUNK, rank);
        let outputs = [dz, d_gates];
        for_chunks(gates.len(), per_chunk, outputs, |pairs, [dz, d_gates]| {
            for (pair, (dz, d_gate)) in pairs.zip(dz.chunks_mut(rank).zip(d_gates)) {
                let row = pair * rank..(pair + 1) * rank;
                let (v, z) = (&v[row.clone()], &z[row]);
                *d_gate = scale * sum_of([v, z], |[v, z]| v * z);
                for (dz, &v) in dz.iter_mut().zip(v) {
                    *dz = scale * gates[pair] * v;
                }
            }
        });
        Ok(())
    }
}

impl Op for GateGradient {
    fn name(&self) -> &'static str {
        "gate_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [pairs, rank] = dims_f32(self.name(), "v", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(pairs * (3 * rank + 2)))
    }

    fn keeps_f32(&self, output: usize) -> bool {
        output == 1
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [pairs, rank] = dims_f32(self.name(), "v", &inputs[0])?;
        expect_f32(self.name(), "the latents", &inputs[1], &[pairs, rank])?;
        if inputs[2].elements() != pairs {
            return Err(crate::Error::shape(
                self.name(),
                format!("the gates are {} for {pairs} pairs", inputs[2]),
            ));
        }
        Ok(vec![inputs[0].clone(), TensorType::f32([pairs])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [pairs, rank] = dims_f32(self.name(), "v", &io.inputs[0])?;
        let launch = Launch::new(shader!("gate_gradient"), "forward")
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            .param(pairs)
            .param(rank)
            .param(self.scale)
            .folded(pairs.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
