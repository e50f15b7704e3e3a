//! Multiplicative noise for training: dropout, and the jitter of a router's input. Its random numbers come from a counter, so nothing
//! is stored for the gradient, and a run with the same seed and step is equal bit for bit, whatever the device.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::spread::element_wise;
use crate::ops::threefry::threefry;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, expect_i32, shader,
};
use crate::tensor::{DType, TensorType};

/// Elements that the CPU makes in one piece: even, because two of them share a block of random words.
const CHUNK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dropout { probability: f32 },
    Jitter { epsilon: f32 },
}

/// Inputs: x, and the seed and step `i32 [2]`.
#[derive(Clone, Copy, Debug)]
struct Noise {
    kind: Kind,
    stream: u32,
}

impl Graph {
    /// Each element of `x` is 0 with probability `probability`, and otherwise divided by `1 - probability`; with 0, `x` itself.
    ///
    /// Which ones: element q of the graph's noise operation number n (dropouts and jitters, counted from 0 as they are added)
    /// is kept if `threefry([seed, step], [q / 2, n])[q % 2] >= round(probability * 2^32)`, with the
    /// [`threefry`](fn@crate::ops::threefry) of this crate and the seed and step of [`Session::set_random`](crate::Session::set_random).
    ///
    /// # Errors
    /// [`Error::Setting`] if the probability is not in `0..1`, [`Error::Shape`] if `x` holds integers.
    pub fn dropout(&mut self, x: Value, probability: f32) -> Result<Value> {
        check_dropout(probability)?;
        if probability == 0.0 {
            return Ok(x);
        }
        self.noise(x, Kind::Dropout { probability })
    }

    /// Each element of `x` times a number uniform in `1 - epsilon..1 + epsilon`: what the Switch Transformer (arXiv 2101.03961, section
    /// 2.4) does to the input of its router while it trains. The random words are those that [`Graph::dropout`] describes, 24
    /// bits of each; with 0, `x` itself.
    ///
    /// # Errors
    /// [`Error::Setting`] if epsilon is not in `0..1`, [`Error::Shape`] if `x` holds integers.
    pub fn jitter(&mut self, x: Value, epsilon: f32) -> Result<Value> {
        if !(0.0..1.0).contains(&epsilon) {
            return Err(Error::setting(
                "epsilon",
                epsilon,
                "must be at least 0 and less than 1",
            ));
        }
        if epsilon == 0.0 {
            return Ok(x);
        }
        self.noise(x, Kind::Jitter { epsilon })
    }

    fn noise(&mut self, x: Value, kind: Kind) -> Result<Value> {
        expect_dtype("noise", "the operand", self.ty(x)?, DType::F32)?;
        let (random, stream) = self.next_noise()?;
        self.apply1(Noise { kind, stream }, &[x, random])
    }
}

/// That a probability is one that dropout can have.
pub(crate) fn check_dropout(probability: f32) -> Result<()> {
    if (0.0..1.0).contains(&probability) {
        Ok(())
    } else {
        Err(Error::setting(
            "dropout",
            probability,
            "must be at least 0 and less than 1",
        ))
    }
}

impl Noise {
    /// Words below this drop their element.
    fn threshold(&self) -> u32 {
        match self.kind {
            // A float below 1 is at most 1 - 2^-24: the product stays below 2^32.
            Kind::Dropout { probability } => {
                (f64::from(probability) * 2.0_f64.powi(32)).round() as u32
            }
            Kind::Jitter { .. } => 0,
        }
    }

    /// What an element with these random bits is multiplied by.
    fn factor<R: Real>(&self, bits: u32, threshold: u32) -> R {
        match self.kind {
            Kind::Dropout { .. } if bits < threshold => R::zero(),
            Kind::Dropout { .. } => R::of(f64::from(self.scale())),
            Kind::Jitter { epsilon } => {
                let u = f64::from(bits >> 8) * 2.0_f64.powi(-24);
                R::of(1.0 + f64::from(epsilon) * (2.0 * u - 1.0))
            }
        }
    }

    fn scale(&self) -> f32 {
        match self.kind {
            Kind::Dropout { probability } => 1.0 / (1.0 - probability),
            Kind::Jitter { epsilon } => epsilon,
        }
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (x, random) = (io.floats(0)?, io.ints(1)?);
        let key = [random[0] as u32, random[1] as u32];
        let threshold = self.threshold();
        let y = io.floats_out(0)?;
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        chunks.enumerate().for_each(|(chunk, (y, x))| {
            for (pair, (y, x)) in y.chunks_mut(2).zip(x.chunks(2)).enumerate() {
                let block = (chunk * (CHUNK / 2) + pair) as u32;
                let bits = threefry(key, [block, self.stream]);
                for ((y, &x), bits) in y.iter_mut().zip(x).zip(bits) {
                    let factor: R = self.factor(bits, threshold);
                    // A dropped element is 0 whatever it was.
                    *y = if factor == R::zero() {
                        R::zero()
                    } else {
                        x * factor
                    };
                }
            }
        });
        Ok(())
    }
}

impl Op for Noise {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Dropout { .. } => "dropout",
            Kind::Jitter { .. } => "jitter",
        }
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        expect_i32(self.name(), "the seed and step", &inputs[1], &[2])?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let random = context.input(1);
        let dx = context.graph.apply1(*self, &[dy, random])?;
        context.add(0, dx)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("noise", "threefry"), "forward")
            .constant("JITTER", matches!(self.kind, Kind::Jitter { .. }))
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .write(3, Slot::Output(0))
            .param(elements)
            .param(self.stream)
            .param(self.threshold())
            .param(self.scale());
        Ok(element_wise(launch, elements, capabilities)?.into())
    }

    host_reference!();
}
