//! `out = sum + scale * addend`, in the memory of `sum`: how gradients that reach a value from several sides are added up, and those
//! of several micro-batches in a parameter.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks};
use crate::ops::spread::element_wise;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_f32, shader,
};
use crate::tensor::TensorType;

#[derive(Clone, Copy, Debug)]
struct Accumulate {
    /// In 64 bits, so that the reference in 64 bits does not add a rounded 1/3.
    scale: f64,
    into_parameter: bool,
}

impl Graph {
    /// `sum + addend`, element by element, both of one shape. The result takes over the memory of `sum` where `sum` is not used
    /// again; [`Graph::add`] broadcasts and never does.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ.
    pub fn accumulate(&mut self, sum: Value, addend: Value) -> Result<Value> {
        self.accumulate_scaled(sum, addend, 1.0)
    }

    /// `sum + scale * addend`, as [`Graph::accumulate`].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ.
    pub fn accumulate_scaled(&mut self, sum: Value, addend: Value, scale: f64) -> Result<Value> {
        let op = Accumulate {
            scale,
            into_parameter: false,
        };
        self.apply1(op, &[sum, addend])
    }

    /// `parameter += scale * addend`: the parameter keeps the sum after the run. Returns the updated parameter; whoever reads the
    /// parameter after this must read that value.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes differ or the first is not a parameter.
    pub fn accumulate_into(
        &mut self,
        parameter: Value,
        addend: Value,
        scale: f64,
    ) -> Result<Value> {
        let op = Accumulate {
            scale,
            into_parameter: true,
        };
        self.apply1(op, &[parameter, addend])
    }
}

impl Accumulate {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (addend, scale) = (io.floats(1)?, R::of(self.scale));
        let sum = io.floats_out(0)?;
        for_chunks(sum.len(), LIGHT_CHUNK, [sum], |at, [sum]| {
            for (sum, &addend) in sum.iter_mut().zip(&addend[at]) {
                *sum += scale * addend;
            }
        });
        Ok(())
    }
}

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let each = 1 + usize::from(self.scale != 1.0);
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * each))
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
        if context.wants(0) {
            context.add(0, gradient)?;
        }
        if context.wants(1) {
            context.accumulate(1, |graph, sum| match sum {
                Some(sum) => graph.accumulate_scaled(sum, gradient, self.scale),
                None if self.scale == 1.0 => Ok(gradient),
                None => graph.scale(gradient, self.scale as f32),
            })?;
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        vec![Alias {
            input: 0,
            output: 0,
            kind: if self.into_parameter {
                AliasKind::Update
            } else {
                AliasKind::Accumulate
            },
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("accumulate"), "forward")
            .read(1, Slot::Input(1))
            .write(2, Slot::Output(0))
            .param(elements)
            .param(self.scale as f32);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
