//! Puts a tensor into a parameter, which stays changed after the run: how a parameter stored in 16 bits follows its master copy.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::spread::element_wise;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_f32, shader,
};
use crate::tensor::TensorType;

/// Inputs: the parameter, the value.
#[derive(Clone, Copy, Debug)]
struct Assign;

impl Graph {
    /// Sets a parameter to `value`, of the same shape. Returns the parameter's new state; whoever reads it after this must read that.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ or the first is not a parameter.
    pub fn assign(&mut self, parameter: Value, value: Value) -> Result<Value> {
        self.apply1(Assign, &[parameter, value])
    }
}

impl Assign {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let value = io.floats(1)?;
        io.floats_out(0)?.copy_from_slice(value);
        Ok(())
    }
}

impl Op for Assign {
    fn name(&self) -> &'static str {
        "assign"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).reading(0, 0))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_f32(self.name(), "the parameter", &inputs[0], inputs[1].dims())?;
        expect_f32(self.name(), "the value", &inputs[1], inputs[0].dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: AliasKind::Update,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("assign"), "forward")
            .read(1, Slot::Input(1))
            .write(2, Slot::Output(0))
            .param(elements);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
