//! The norm of all gradients together, and the factor that clips it.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::host_sum::total_of;
use crate::ops::{HostIo, LaunchTypes, Op, Real, TOTAL_WORKGROUP, Work, expect_dtype, shader};
use crate::tensor::{DType, TensorType};

/// Elements whose squares one workgroup adds up.
const CHUNK: usize = 8192;

#[derive(Clone, Copy, Debug)]
struct GradientNorm {
    inputs: usize,
    max_norm: f32,
}

impl Graph {
    /// `[norm, scale]` with the Euclidean norm of all tensors together, before clipping, and
    /// `scale = min(1, max_norm / (norm + 1e-6))`: what to multiply each with so that the norm is at most `max_norm`.
    ///
    /// # Errors
    /// [`Error::Setting`] if `max_norm` is not positive, [`Error::Shape`] if there are no tensors or one holds integers.
    pub fn gradient_norm(&mut self, gradients: &[Value], max_norm: f32) -> Result<Value> {
        if max_norm.is_nan() || max_norm <= 0.0 {
            return Err(Error::setting(
                "max_norm",
                max_norm,
                "must be greater than 0",
            ));
        }
        self.apply1(
            GradientNorm {
                inputs: gradients.len(),
                max_norm,
            },
            gradients,
        )
    }
}

impl GradientNorm {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let mut square = 0.0;
        for input in 0..self.inputs {
            square += total_of(io.floats(input)?, |g| g * g).f64();
        }
        let norm = R::of(square).sqrt();
        let out = io.floats_out(0)?;
        out[0] = norm;
        out[1] = (R::of(f64::from(self.max_norm)) / (norm + R::of(1e-6))).min(R::one());
        Ok(())
    }
}

impl Op for GradientNorm {
    fn name(&self) -> &'static str {
        "gradient_norm"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let elements: usize = io.inputs.iter().map(TensorType::elements).sum();
        Ok(Work::moving(io).with_flops(2 * elements))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        if inputs.is_empty() {
            return Err(Error::shape(self.name(), "there are no gradients"));
        }
        for ty in inputs {
            expect_dtype(self.name(), "a gradient", ty, DType::F32)?;
        }
        Ok(vec![TensorType::f32([2])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let chunks: Vec<usize> = io
            .inputs
            .iter()
            .map(|ty| ty.elements().div_ceil(CHUNK))
            .collect();
        let total: usize = chunks.iter().sum();
        let mut launches = Launches::default();
        let partial = launches.scratch_words(total);
        let mut first = 0;
        for (input, (ty, &chunks)) in io.inputs.iter().zip(&chunks).enumerate() {
            let launch = Launch::new(shader!("gradient_norm", "reduce"), "partial_sums")
                .constant("WORKGROUP", TOTAL_WORKGROUP)
                .read(1, Slot::Input(input))
                .write(2, partial)
                .param(ty.elements())
                .param(CHUNK)
                .param(first)
                .param(self.max_norm)
                .folded(chunks, capabilities)?;
            launches.launches.push(launch);
            first += chunks;
        }
        let launch = Launch::new(shader!("gradient_norm", "reduce"), "finish")
            .constant("WORKGROUP", TOTAL_WORKGROUP)
            .read(1, partial)
            .write(2, Slot::Output(0))
            .param(total)
            .param(CHUNK)
            .param(0_usize)
            .param(self.max_norm)
            .folded(1, capabilities)?;
        launches.launches.push(launch);
        Ok(launches)
    }

    host_reference!();
}
