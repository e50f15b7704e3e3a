//! Sums, differences, products and quotients of two tensors, element by element, with NumPy's broadcasting.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks, in_blocks, map_elements};
use crate::ops::spread::element_wise;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, shader};
use crate::tensor::{DType, Shape, TensorType};

const WORKGROUP: usize = 64;
/// Dimensions after merging neighbours that broadcast alike; the kernel unrolls this many.
const MAX_PATTERN: usize = 4;

/// Which function; the numbers are those of `shaders/binary.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Add = 0,
    Sub = 1,
    Mul = 2,
    Div = 3,
}

#[derive(Clone, Copy, Debug)]
struct Binary(Function);

impl Graph {
    /// `a + b`, element by element; extents of 1 are repeated.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn add(&mut self, a: Value, b: Value) -> Result<Value> {
        self.apply1(Binary(Function::Add), &[a, b])
    }

    /// `a - b`, element by element; extents of 1 are repeated.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn sub(&mut self, a: Value, b: Value) -> Result<Value> {
        self.apply1(Binary(Function::Sub), &[a, b])
    }

    /// `a * b`, element by element; extents of 1 are repeated.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn mul(&mut self, a: Value, b: Value) -> Result<Value> {
        self.apply1(Binary(Function::Mul), &[a, b])
    }

    /// `a / b`, element by element; extents of 1 are repeated.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn div(&mut self, a: Value, b: Value) -> Result<Value> {
        self.apply1(Binary(Function::Div), &[a, b])
    }
}

/// A broadcast as a loop nest: extents, and for each operand the step in its elements (0 where it is repeated).
struct Pattern {
    extents: Vec<usize>,
    steps: [Vec<usize>; 2],
}

impl Pattern {
    fn new(a: &Shape, b: &Shape, out: &Shape) -> Self {
        let strides = |shape: &Shape| {
            let mut step = 1;
            let mut steps = vec![0; out.rank()];
            for axis in (0..shape.rank()).rev() {
                let extent = shape.dims()[axis];
                steps[axis + out.rank() - shape.rank()] = if extent == 1 { 0 } else { step };
                step *= extent;
            }
            steps
        };
        let steps = [strides(a), strides(b)];
        let mut pattern = Self {
            extents: Vec::new(),
            steps: [Vec::new(), Vec::new()],
        };
        for axis in 0..out.rank() {
            let extent = out.dims()[axis];
            let step = [steps[0][axis], steps[1][axis]];
            // A neighbour that steps on where this axis ends is one loop with it.
            let merges = pattern.extents.last().is_some()
                && (0..2).all(|operand| {
                    let outer = pattern.steps[operand].last().copied().unwrap_or(0);
                    outer == step[operand] * extent
                });
            match (extent, merges, pattern.extents.last_mut()) {
                (1, ..) => {}
                (_, true, Some(last)) => {
                    *last *= extent;
                    for (steps, step) in pattern.steps.iter_mut().zip(step) {
                        steps.pop();
                        steps.push(step);
                    }
                }
                _ => {
                    pattern.extents.push(extent);
                    for (steps, step) in pattern.steps.iter_mut().zip(step) {
                        steps.push(step);
                    }
                }
            }
        }
        pattern
    }

    /// Where in its operand an element of the result comes from.
    fn offset(&self, operand: usize, mut index: usize) -> usize {
        let mut offset = 0;
        for (&extent, &step) in self.extents.iter().zip(&self.steps[operand]).rev() {
            offset += index % extent * step;
            index /= extent;
        }
        offset
    }
}

fn broadcast<R: Real>(mut io: HostIo<'_, R>, function: impl Fn(R, R) -> R + Sync) -> Result<()> {
    let (a, b) = (io.floats(0)?, io.floats(1)?);
    let (a_shape, b_shape) = (&io.input_type(0)?.shape, &io.input_type(1)?.shape);
    let out = io.floats_out(0)?;
    if a_shape == b_shape {
        map_elements(LIGHT_CHUNK, out, [a, b], |[a, b]| function(a, b));
        return Ok(());
    }
    let shape = a_shape.broadcast(b_shape).unwrap_or_default();
    let pattern = Pattern::new(a_shape, b_shape, &shape);
    // In the innermost loop an operand goes on by one or stays where it is.
    let last = |list: &[usize], otherwise: usize| list.last().copied().unwrap_or(otherwise);
    let length = last(&pattern.extents, 1);
    let steps = [0, 1].map(|operand: usize| last(&pattern.steps[operand], 1));
    for_chunks(out.len(), LIGHT_CHUNK, [out], |at, [mut out]| {
        for (row, part) in in_blocks(at, length) {
            let (here, rest) = out.split_at_mut(part.len());
            out = rest;
            let [a_at, b_at] = [0, 1].map(|operand: usize| {
                pattern.offset(operand, row * length) + part.start * steps[operand]
            });
            match steps {
                [0, _] => {
                    let a = a[a_at];
                    for (out, &b) in here.iter_mut().zip(&b[b_at..]) {
                        *out = function(a, b);
                    }
                }
                [_, 0] => {
                    let b = b[b_at];
                    for (out, &a) in here.iter_mut().zip(&a[a_at..]) {
                        *out = function(a, b);
                    }
                }
                _ => {
                    for ((out, &a), &b) in here.iter_mut().zip(&a[a_at..]).zip(&b[b_at..]) {
                        *out = function(a, b);
                    }
                }
            }
        }
    });
    Ok(())
}

impl Binary {
    fn reference<R: Real>(&self, io: HostIo<'_, R>) -> Result<()> {
        // A loop for each function: one that chooses inside would not be vectorised.
        match self.0 {
            Function::Add => broadcast(io, |a, b| a + b),
            Function::Sub => broadcast(io, |a, b| a - b),
            Function::Mul => broadcast(io, |a, b| a * b),
            Function::Div => broadcast(io, |a, b| a / b),
        }
    }
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self.0 {
            Function::Add => "add",
            Function::Sub => "sub",
            Function::Mul => "mul",
            Function::Div => "div",
        }
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_dtype(self.name(), "the left operand", &inputs[0], DType::F32)?;
        expect_dtype(self.name(), "the right operand", &inputs[1], DType::F32)?;
        let (a, b) = (&inputs[0].shape, &inputs[1].shape);
        let shape = a.broadcast(b).ok_or_else(|| {
            Error::shape(
                self.name(),
                format!("{} and {} do not broadcast", inputs[0], inputs[1]),
            )
        })?;
        let pattern = Pattern::new(a, b, &shape).extents.len();
        if pattern > MAX_PATTERN {
            return Err(Error::Limit {
                thing: format!("broadcasting {a} with {b}"),
                needed: pattern as u64,
                limit: MAX_PATTERN as u64,
                unit: "alternating dimensions",
            });
        }
        Ok(vec![TensorType::f32(shape)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let operands = [context.input(0), context.input(1)];
        for input in 0..2 {
            if !context.wants(input) {
                continue;
            }
            let graph = &mut *context.graph;
            let [a, b] = operands;
            let gradient = match (self.0, input) {
                (Function::Add, _) | (Function::Sub, 0) => dy,
                (Function::Sub, _) => graph.neg(dy)?,
                (Function::Mul, _) => graph.mul(dy, operands[1 - input])?,
                (Function::Div, 0) => graph.div(dy, b)?,
                (Function::Div, _) => {
                    let square = graph.square(b)?;
                    let quotient = graph.div(a, square)?;
                    let product = graph.mul(dy, quotient)?;
                    graph.neg(product)?
                }
            };
            let shape = graph.ty(operands[input])?.shape.clone();
            let gradient = graph.sum_to(gradient, &shape)?;
            context.add(input, gradient)?;
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let (a, b, out) = (
            &io.inputs[0].shape,
            &io.inputs[1].shape,
            &io.outputs[0].shape,
        );
        let elements = out.elements();
        let same = a == b;
        let launch = Launch::new(
            shader!("binary"),
            if same { "same_shape" } else { "broadcast" },
        )
        .constant("FUNCTION", f64::from(self.0 as u32));
        let launch = if same {
            launch
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .write(3, Slot::Output(0))
        } else {
            launch
                .read(4, Slot::Input(0))
                .read(5, Slot::Input(1))
                .write(6, Slot::Output(0))
        };
        let pattern = Pattern::new(a, b, out);
        let mut launch = launch.param(elements);
        // Innermost first; what is missing is one step of nothing.
        for axis in 0..MAX_PATTERN {
            let at = |list: &[usize], default: usize| {
                list.iter().rev().nth(axis).copied().unwrap_or(default)
            };
            launch = launch
                .param(at(&pattern.extents, 1))
                .param(at(&pattern.steps[0], 0))
                .param(at(&pattern.steps[1], 0));
        }
        let launch = if same {
            element_wise(launch, elements, capabilities)?
        } else {
            launch.folded(elements.div_ceil(WORKGROUP), capabilities)?
        };
        Ok(launch.into())
    }

    host_reference!();
}
