//! SiLU (swish), `x * sigmoid(x)`: the activation of gated feed-forward layers.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{HEAVY_CHUNK, map_elements};
use crate::ops::spread::element_wise;
use crate::ops::{
    Activation, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, expect_f32, shader,
};
use crate::tensor::{DType, TensorType};

#[derive(Clone, Copy, Debug)]
struct Silu;

/// Operands x, dy.
#[derive(Clone, Copy, Debug)]
struct SiluBackward;

impl Graph {
    /// `x * sigmoid(x)`, element by element, for `x` of any shape; does not overflow for large `|x|`
    /// (Elfwing et al. 2017, arXiv 1702.03118).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn silu(&mut self, x: Value) -> Result<Value> {
        self.apply1(Silu, &[x])
    }
}

/// sigmoid(x) and 1 - sigmoid(x), without cancellation and from the exponential of a number that is not positive.
pub(crate) fn sigmoids<R: Real>(x: R) -> (R, R) {
    let e = (-x.abs()).exp();
    let (large, small) = (R::one() / (R::one() + e), e / (R::one() + e));
    if x >= R::zero() {
        (large, small)
    } else {
        (small, large)
    }
}

impl Silu {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        map_elements(HEAVY_CHUNK, io.floats_out(0)?, [x], |[x]| x * sigmoids(x).0);
        Ok(())
    }
}

impl Op for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [value, _] = Activation::Silu.flops();
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * value))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let x = context.input(0);
        let dx = context.graph.apply1(SiluBackward, &[x, dy])?;
        context.add(0, dx)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("silu"), "forward")
            .read(1, Slot::Input(0))
            .write(3, Slot::Output(0))
            .param(elements);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}

impl SiluBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (x, dy) = (io.floats(0)?, io.floats(1)?);
        map_elements(HEAVY_CHUNK, io.floats_out(0)?, [x, dy], |[x, dy]| {
            let (s, one_minus_s) = sigmoids(x);
            dy * (s * (R::one() + x * one_minus_s))
        });
        Ok(())
    }
}

impl Op for SiluBackward {
    fn name(&self) -> &'static str {
        "silu_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [_, derivative] = Activation::Silu.flops();
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * (derivative + 1)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_dtype(self.name(), "x", &inputs[0], DType::F32)?;
        expect_f32(self.name(), "dy", &inputs[1], inputs[0].dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("silu"), "backward")
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .write(3, Slot::Output(0))
            .param(elements);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
