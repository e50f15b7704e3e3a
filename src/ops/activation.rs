//! The activations of feed-forward layers, plain and as the product of a gated layer: `f(gate) * up`.

use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{HEAVY_CHUNK, for_chunks, map_elements};
use crate::ops::silu::sigmoids;
use crate::ops::spread::element_wise;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, expect_f32, shader,
};
use crate::tensor::{DType, TensorType};

/// What a feed-forward layer does to its hidden numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x sigmoid(x)`; with a gate, SwiGLU (Shazeer, arXiv 2002.05202).
    #[default]
    Silu,
    /// `x Φ(x)`, Φ the normal distribution (Hendrycks and Gimpel, arXiv 1606.08415), exact.
    Gelu,
    /// The approximation of GELU by tanh (arXiv 1606.08415, section 2): what GPT-2 and Gemma use.
    GeluTanh,
}

/// sqrt(8 / pi): twice the factor in front of GELU's tanh.
const TWICE_ROOT: f64 = 1.595_769_121_605_730_8;
const CUBIC: f64 = 0.044_715;

impl Activation {
    /// Every activation.
    pub const ALL: [Self; 3] = [Self::Silu, Self::Gelu, Self::GeluTanh];

    /// The number of `ACTIVATION` in `shaders/parts/activation.wgsl`.
    pub(crate) fn code(self) -> f64 {
        match self {
            Self::Silu => 0.0,
            Self::Gelu => 1.0,
            Self::GeluTanh => 2.0,
        }
    }

    /// FLOP of a value and of a derivative.
    pub(crate) fn flops(self) -> [usize; 2] {
        match self {
            Self::Silu => [4, 8],
            Self::Gelu => [4, 9],
            Self::GeluTanh => [10, 17],
        }
    }

    fn tanh_argument<R: Real>(x: R) -> R {
        R::of(TWICE_ROOT) * (x + R::of(CUBIC) * x * x * x)
    }

    /// Φ(x), with the digits of its far tail.
    fn normal_cdf<R: Real>(x: R) -> R {
        R::of(0.5 * libm::erfc(-x.f64() * std::f64::consts::FRAC_1_SQRT_2))
    }

    /// f(x).
    pub(crate) fn value<R: Real>(self, x: R) -> R {
        x * match self {
            Self::Silu => sigmoids(x).0,
            Self::Gelu => Self::normal_cdf(x),
            Self::GeluTanh => sigmoids(Self::tanh_argument(x)).0,
        }
    }

    /// f'(x).
    pub(crate) fn derivative<R: Real>(self, x: R) -> R {
        match self {
            Self::Silu => {
                let (s, one_minus_s) = sigmoids(x);
                s * (R::one() + x * one_minus_s)
            }
            Self::Gelu => {
                let density = (-R::of(0.5) * x * x).exp() * R::of(0.398_942_280_401_432_7);
                Self::normal_cdf(x) + x * density
            }
            Self::GeluTanh => {
                let y = x.max(R::of(-30.0)).min(R::of(30.0));
                let (s, one_minus_s) = sigmoids(Self::tanh_argument(y));
                let slope = R::of(TWICE_ROOT) * (R::one() + R::of(3.0 * CUBIC) * y * y);
                s * (R::one() + one_minus_s * y * slope)
            }
        }
    }
}

/// Operands gate, up if `gated`.
#[derive(Clone, Copy, Debug)]
struct Activate {
    activation: Activation,
    gated: bool,
}

/// Operands gate, up if `gated`, dh. Results d_gate, d_up if `gated`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ActivateBackward {
    pub(crate) activation: Activation,
    pub(crate) gated: bool,
}

impl Graph {
    /// `f(gate) * up`, element by element, or `f(gate)`: the middle of a feed-forward layer.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the operands hold integers or differ in shape.
    pub fn activate(
        &mut self,
        activation: Activation,
        gate: Value,
        up: Option<Value>,
    ) -> Result<Value> {
        let op = Activate {
            activation,
            gated: up.is_some(),
        };
        self.apply1(op, &[gate].into_iter().chain(up).collect::<Vec<_>>())
    }
}

fn launch(activation: Activation, gated: bool, entry: &'static str) -> Launch {
    Launch::new(shader!("activation", "activation"), entry)
        .constant("ACTIVATION", activation.code())
        .constant("GATED", gated)
        .read(1, Slot::Input(0))
        // Without a gate the binding is not read: any buffer will do.
        .read(2, Slot::Input(usize::from(gated)))
}

impl Activate {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (gate, h) = (io.floats(0)?, io.floats_out(0)?);
        let activation = self.activation;
        if self.gated {
            let operands = [gate, io.floats(1)?];
            map_elements(HEAVY_CHUNK, h, operands, |[gate, up]| {
                activation.value(gate) * up
            });
        } else {
            map_elements(HEAVY_CHUNK, h, [gate], |[gate]| activation.value(gate));
        }
        Ok(())
    }
}

impl Op for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let elements = io.outputs[0].elements();
        let [value, _] = self.activation.flops();
        Ok(Work::moving(io).with_flops(elements * (value + usize::from(self.gated))))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1 + usize::from(self.gated))?;
        expect_dtype(self.name(), "the gate", &inputs[0], DType::F32)?;
        if self.gated {
            expect_f32(self.name(), "up", &inputs[1], inputs[0].dims())?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dh) = context.gradient(0) else {
            return Ok(());
        };
        let operands = (0..1 + usize::from(self.gated)).map(|input| context.input(input));
        let operands: Vec<Value> = operands.chain([dh]).collect();
        let op = ActivateBackward {
            activation: self.activation,
            gated: self.gated,
        };
        let outputs = context.graph.apply(op, &operands)?;
        for (input, gradient) in outputs.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = launch(self.activation, self.gated, "forward")
            .write(3, Slot::Output(0))
            .param(elements);
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}

impl ActivateBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let gate = io.floats(0)?;
        let dh = io.floats(1 + usize::from(self.gated))?;
        let d_gate = io.floats_out(0)?;
        let activation = self.activation;
        if !self.gated {
            map_elements(HEAVY_CHUNK, d_gate, [gate, dh], |[gate, dh]| {
                dh * activation.derivative(gate)
            });
            return Ok(());
        }
        let up = io.floats(1)?;
        let outputs = [d_gate, io.floats_out(1)?];
        for_chunks(gate.len(), HEAVY_CHUNK, outputs, |at, [d_gate, d_up]| {
            let operands = gate[at.clone()].iter().zip(&up[at.clone()]).zip(&dh[at]);
            let results = d_gate.iter_mut().zip(d_up);
            for ((d_gate, d_up), ((&gate, &up), &dh)) in results.zip(operands) {
                *d_gate = dh * activation.derivative(gate) * up;
                *d_up = dh * activation.value(gate);
            }
        });
        Ok(())
    }
}

impl Op for ActivateBackward {
    fn name(&self) -> &'static str {
        "activate_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let elements = io.outputs[0].elements();
        let [_, derivative] = self.activation.flops();
        let gated = 3 * usize::from(self.gated);
        Ok(Work::moving(io).with_flops(elements * (derivative + 1 + gated)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let operands = 1 + usize::from(self.gated);
        expect_count(self.name(), inputs, operands + 1)?;
        for ty in inputs {
            expect_f32(self.name(), "an operand", ty, inputs[0].dims())?;
        }
        Ok(inputs[..operands].to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let mut launches = Launches::default();
        // Without a gate nothing is written to the last binding, but a buffer must be there.
        let d_up = if self.gated {
            Slot::Output(1)
        } else {
            launches.scratch_words(4)
        };
        let launch = launch(self.activation, self.gated, "backward")
            .read(4, Slot::Input(1 + usize::from(self.gated)))
            .write(5, Slot::Output(0))
            .write(6, d_up)
            .param(elements);
        launches
            .launches
            .push(element_wise(launch, elements, capabilities)?);
        Ok(launches)
    }

    host_reference!();
}
