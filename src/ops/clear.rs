//! Sets a parameter to zero, in place: the sum of the gradients once a step has used it.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks};
use crate::ops::spread::element_wise;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, shader,
};
use crate::tensor::{DType, TensorType};

#[derive(Clone, Copy, Debug)]
struct Clear;

impl Graph {
    /// Sets a parameter to zero, and it stays zero after the run. Whatever needs its old value must stand before this in the graph; returns
    /// the parameter as it is then.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the value is not a parameter.
    pub fn clear(&mut self, parameter: Value) -> Result<Value> {
        self.apply1(Clear, &[parameter])
    }
}

impl Clear {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let y = io.floats_out(0)?;
        for_chunks(y.len(), LIGHT_CHUNK, [y], |_, [y]| y.fill(R::zero()));
        Ok(())
    }
}

impl Op for Clear {
    fn name(&self) -> &'static str {
        "clear"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).reading(0, 0))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the parameter", &inputs[0], DType::F32)?;
        Ok(vec![inputs[0].clone()])
    }

    fn differentiable(&self, _input: usize) -> bool {
        false
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
        let launch = Launch::new(shader!("clear"), "forward")
            .write(1, Slot::Output(0))
            .param(elements);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
