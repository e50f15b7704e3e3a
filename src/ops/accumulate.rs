//! `out = sum + addend`, in the memory of `sum`: how gradients that reach a value from several sides are added up.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, expect_count, expect_f32, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

#[derive(Clone, Copy, Debug)]
struct Accumulate;

impl Graph {
    /// `sum + addend`, element by element, both of one shape. The result takes over the memory of `sum` where `sum` is not used
    /// again; [`Graph::add`] broadcasts and never does.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ.
    pub fn accumulate(&mut self, sum: Value, addend: Value) -> Result<Value> {
        self.apply1(Accumulate, &[sum, addend])
    }
}

impl Accumulate {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let addend = io.floats(1)?;
        for (sum, &addend) in io.floats_out(0)?.iter_mut().zip(addend) {
            *sum += addend;
        }
        Ok(())
    }
}

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_f32(self.name(), "the sum", &inputs[0], inputs[1].dims())?;
        expect_f32(self.name(), "the addend", &inputs[1], inputs[0].dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(gradient) = context.gradient(0) else {
            return Ok(());
        };
        for input in 0..2 {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: AliasKind::Accumulate,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("accumulate"), "forward")
            .read(1, Slot::Input(1))
            .write(2, Slot::Output(0))
            .param(elements)
            .folded(elements.div_ceil(4 * WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
