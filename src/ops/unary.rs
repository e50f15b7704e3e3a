//! Arithmetic on one tensor, element by element: a x + b, negation, square, square root, reciprocal, exp, ln, tanh, sigmoid.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{HEAVY_CHUNK, LIGHT_CHUNK, map_elements};
use crate::ops::silu::sigmoids;
use crate::ops::spread::element_wise;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, shader};
use crate::tensor::{DType, TensorType};

/// Which function; the numbers are those of `shaders/unary.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Affine {
        scale: f32,
        offset: f32,
    },
    Square,
    SquareRoot,
    Reciprocal,
    Exp,
    Ln,
    Tanh,
    /// The derivative of tanh, `1 - tanh² x`, from x: from the result it would have no digits left where tanh is nearly 1.
    TanhSlope,
    Sigmoid,
}

#[derive(Clone, Copy, Debug)]
struct Unary(Function);

impl Graph {
    /// `scale * x + offset`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn affine(&mut self, x: Value, scale: f32, offset: f32) -> Result<Value> {
        self.apply1(Unary(Function::Affine { scale, offset }), &[x])
    }

    /// `factor * x`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn scale(&mut self, x: Value, factor: f32) -> Result<Value> {
        self.affine(x, factor, 0.0)
    }

    /// `-x`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn neg(&mut self, x: Value) -> Result<Value> {
        self.affine(x, -1.0, 0.0)
    }

    /// `x * x`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn square(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Square), &[x])
    }

    /// The square root, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn sqrt(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::SquareRoot), &[x])
    }

    /// `1 / x`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn reciprocal(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Reciprocal), &[x])
    }

    /// e to the power of x, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn exp(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Exp), &[x])
    }

    /// The natural logarithm, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn ln(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Ln), &[x])
    }

    /// The hyperbolic tangent, element by element, right to f32 rounding for every x.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn tanh(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Tanh), &[x])
    }

    /// `1 / (1 + e^-x)`, element by element; does not overflow.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` holds integers.
    pub fn sigmoid(&mut self, x: Value) -> Result<Value> {
        self.apply1(Unary(Function::Sigmoid), &[x])
    }
}

impl Unary {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        let y = io.floats_out(0)?;
        // A loop for each function: one that chooses inside would not be vectorised.
        match self.0 {
            Function::Affine { scale, offset } => {
                let [scale, offset] = [scale, offset].map(|x| R::of(f64::from(x)));
                map_elements(LIGHT_CHUNK, y, [x], |[x]| scale * x + offset);
            }
            Function::Square => map_elements(LIGHT_CHUNK, y, [x], |[x]| x * x),
            Function::SquareRoot => map_elements(LIGHT_CHUNK, y, [x], |[x]| x.sqrt()),
            Function::Reciprocal => map_elements(LIGHT_CHUNK, y, [x], |[x]| x.recip()),
            Function::Exp => map_elements(HEAVY_CHUNK, y, [x], |[x]| x.exp()),
            Function::Ln => map_elements(HEAVY_CHUNK, y, [x], |[x]| x.ln()),
            Function::Tanh => map_elements(HEAVY_CHUNK, y, [x], |[x]| x.tanh()),
            Function::TanhSlope => map_elements(HEAVY_CHUNK, y, [x], |[x]| {
                let e = (R::of(-2.0) * x.abs()).exp();
                R::of(4.0) * e / ((R::one() + e) * (R::one() + e))
            }),
            Function::Sigmoid => map_elements(HEAVY_CHUNK, y, [x], |[x]| sigmoids(x).0),
        }
        Ok(())
    }
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        match self.0 {
            Function::Affine { .. } => "affine",
            Function::Square => "square",
            Function::SquareRoot => "sqrt",
            Function::Reciprocal => "reciprocal",
            Function::Exp => "exp",
            Function::Ln => "ln",
            Function::Tanh => "tanh",
            Function::TanhSlope => "tanh_slope",
            Function::Sigmoid => "sigmoid",
        }
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let each = match self.0 {
            Function::Affine { scale, offset } => {
                usize::from(scale != 1.0) + usize::from(offset != 0.0)
            }
            Function::TanhSlope => 3,
            Function::Sigmoid => 4,
            _ => 1,
        };
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * each))
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
        let (x, y) = (context.input(0), context.output(0));
        let graph = &mut *context.graph;
        let dx = match self.0 {
            Function::Affine { scale, .. } => graph.scale(dy, scale)?,
            Function::Square => {
                let twice = graph.scale(x, 2.0)?;
                graph.mul(dy, twice)?
            }
            Function::SquareRoot => {
                let half = graph.scale(dy, 0.5)?;
                graph.div(half, y)?
            }
            Function::Reciprocal => {
                let square = graph.square(y)?;
                let product = graph.mul(dy, square)?;
                graph.neg(product)?
            }
            Function::Exp => graph.mul(dy, y)?,
            Function::Ln => graph.div(dy, x)?,
            Function::Tanh => {
                let slope = graph.apply1(Self(Function::TanhSlope), &[x])?;
                graph.mul(dy, slope)?
            }
            Function::TanhSlope => {
                let tanh = graph.tanh(x)?;
                let product = graph.mul(tanh, y)?;
                let twice = graph.scale(product, -2.0)?;
                graph.mul(dy, twice)?
            }
            Function::Sigmoid => {
                // 1 - y as the sigmoid of -x: it keeps its digits where y is nearly 1.
                let minus_x = graph.neg(x)?;
                let complement = graph.sigmoid(minus_x)?;
                let slope = graph.mul(y, complement)?;
                graph.mul(dy, slope)?
            }
        };
        context.add(0, dx)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let (code, scale, offset) = match self.0 {
            Function::Affine { scale, offset } => (0, scale, offset),
            Function::Square => (1, 0.0, 0.0),
            Function::SquareRoot => (2, 0.0, 0.0),
            Function::Reciprocal => (3, 0.0, 0.0),
            Function::Exp => (4, 0.0, 0.0),
            Function::Ln => (5, 0.0, 0.0),
            Function::Tanh => (6, 0.0, 0.0),
            Function::TanhSlope => (7, 0.0, 0.0),
            Function::Sigmoid => (8, 0.0, 0.0),
        };
        let launch = Launch::new(shader!("unary"), "forward")
            .constant("FUNCTION", code)
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .param(elements)
            .param(scale)
            .param(offset);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
