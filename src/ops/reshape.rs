//! The same elements under another shape. Nothing is launched or copied.

use crate::device::{Capabilities, Launches};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::ops::{Alias, AliasKind, HostIo, LaunchTypes, Op, expect_count};
use crate::tensor::{Shape, TensorType};

#[derive(Clone, Debug)]
struct Reshape {
    shape: Shape,
}

impl Graph {
    /// The elements of `value`, in row-major order, as a tensor of another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&mut self, value: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        if self.ty(value)?.shape == shape {
            return Ok(value);
        }
        self.apply1(Reshape { shape }, &[value])
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        if self.shape.elements() != inputs[0].elements() {
            return Err(Error::shape(
                self.name(),
                format!("{} has not as many elements as {}", inputs[0], self.shape),
            ));
        }
        Ok(vec![TensorType {
            shape: self.shape.clone(),
            dtype: inputs[0].dtype,
        }])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        if let Some(gradient) = context.gradient(0) {
            let shape = context.graph.ty(context.input(0))?.shape.clone();
            let gradient = context.graph.reshape(gradient, shape)?;
            context.add(0, gradient)?;
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: AliasKind::View,
        }]
    }

    fn launches(&self, _io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Launches> {
        Ok(Launches::default())
    }

    fn reference_f32(&self, _io: HostIo<'_, f32>) -> Result<()> {
        Ok(())
    }

    fn reference_f64(&self, _io: HostIo<'_, f64>) -> Result<()> {
        Ok(())
    }
}
