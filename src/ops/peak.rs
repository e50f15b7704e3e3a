//! What measures a device's own limits: the rate of multiply-adds in registers, and a copy.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, element_wise, expect_count, expect_dtype, shader,
};
use crate::tensor::{DType, TensorType};

const WORKGROUP: usize = 64;
/// Steps of every chain in a turn of the loop, as in `shaders/peak.wgsl`.
const STEPS: usize = 4;
/// What a step multiplies by and adds: parameters of the kernel, so that no compiler can foresee a result. Every chain tends to 1.5.
const FACTOR: f32 = 0.5;
const OFFSET: f32 = 0.75;
/// Elements that the host copies in one piece.
const PIECE: usize = 1 << 16;

/// Multiply-adds for their own sake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiplyAdds {
    /// Chains that do not depend on one another, for each element: 1 to 8.
    pub chains: usize,
    /// Turns of a loop with four multiply-adds of each chain: at most 32,768, because software drivers cut long loops short.
    pub turns: usize,
    /// Whether to ask for fused multiply-adds, or for a product and a sum, which compilers may fuse or not.
    pub fused: bool,
}

/// How a copy is spread over invocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyForm {
    /// Invocations of a workgroup: 64, 128 or 256.
    pub workgroup: usize,
    /// Pieces of 16 bytes that each takes, a workgroup apart: 1, 2 or 4.
    pub quads: usize,
}

/// A copy of a tensor, spread as kernels are or as given.
#[derive(Clone, Copy, Debug)]
struct Copy(Option<CopyForm>);

impl Graph {
    /// Keeps a device's arithmetic units busy and nothing else, to measure how fast they are: the sum of chains of multiply-adds that start
    /// from each element of `x`.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are too many chains or turns, or none; [`Error::Shape`] if `x` holds integers.
    pub fn multiply_adds(&mut self, x: Value, options: MultiplyAdds) -> Result<Value> {
        self.apply1(options, &[x])
    }

    /// A copy of `x` in memory of its own. Nothing needs one, as values never change: it measures how fast memory is.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` holds integers.
    pub fn copy(&mut self, x: Value) -> Result<Value> {
        self.apply1(Copy(None), &[x])
    }

    /// [`Graph::copy`] with the work spread as given, because adapters differ in what is fastest.
    ///
    /// # Errors
    /// [`Error::Setting`] if `form` is none of the forms there are; [`Error::Shape`] if `x` holds integers.
    pub fn copy_in_form(&mut self, x: Value, form: CopyForm) -> Result<Value> {
        self.apply1(Copy(Some(form)), &[x])
    }
}

impl MultiplyAdds {
    /// The largest number of chains.
    pub const MAX_CHAINS: usize = 8;
    /// The largest number of turns.
    pub const MAX_TURNS: usize = 32_768;

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        let (factor, offset) = (R::of(f64::from(FACTOR)), R::of(f64::from(OFFSET)));
        let y = io.floats_out(0)?;
        y.par_iter_mut().zip(x).for_each(|(y, &x)| {
            *y = (0..self.chains)
                .map(|chain| {
                    let start = x + R::of(chain as f64);
                    (0..self.turns * STEPS).fold(start, |v, _| v * factor + offset)
                })
                .sum();
        });
        Ok(())
    }
}

impl Op for MultiplyAdds {
    fn name(&self) -> &'static str {
        "multiply_adds"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let each = self.chains * self.turns * STEPS * 2 + 2 * (self.chains - 1);
        Ok(Work::moving(io).with_flops(io.outputs[0].elements() * each))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        for (setting, value, most) in [
            ("chains", self.chains, Self::MAX_CHAINS),
            ("turns", self.turns, Self::MAX_TURNS),
        ] {
            if value == 0 || value > most {
                return Err(Error::setting(
                    setting,
                    value,
                    format!("there are between 1 and {most}"),
                ));
            }
        }
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = launch("multiply_adds", io, self.turns)
            .constant("CHAINS", self.chains as f64)
            .constant("FUSED", self.fused)
            .folded(elements.div_ceil(4 * WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl CopyForm {
    /// Every form that there is.
    pub const ALL: [Self; 9] = {
        let mut forms = [Self {
            workgroup: 64,
            quads: 1,
        }; 9];
        let mut which = 0;
        while which < forms.len() {
            forms[which].workgroup = 64 << (which / 3);
            forms[which].quads = 1 << (which % 3);
            which += 1;
        }
        forms
    };
}

impl Copy {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        let pieces = io.floats_out(0)?.par_chunks_mut(PIECE);
        pieces
            .zip(x.par_chunks(PIECE))
            .for_each(|(y, x)| y.copy_from_slice(x));
        Ok(())
    }
}

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        if let Some(form) = self.0.filter(|form| !CopyForm::ALL.contains(form)) {
            return Err(Error::setting(
                "form",
                format!("{} x {}", form.workgroup, form.quads),
                "a copy has 64, 128 or 256 invocations a workgroup, and each takes 1, 2 or 4 pieces",
            ));
        }
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        match context.gradient(0) {
            Some(dy) => context.add(0, dy),
            None => Ok(()),
        }
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = launch("copy", io, 0);
        let launch = match self.0 {
            None => element_wise(launch, elements, capabilities)?,
            Some(CopyForm { workgroup, quads }) => launch
                .constant("WORKGROUP", workgroup as f64)
                .constant("QUADS", quads as f64)
                .folded(elements.div_ceil(4 * workgroup * quads), capabilities)?,
        };
        Ok(launch.into())
    }

    host_reference!();
}

fn launch(entry: &'static str, io: LaunchTypes<'_>, turns: usize) -> Launch {
    Launch::new(shader!("peak"), entry)
        .read(1, Slot::Input(0))
        .write(2, Slot::Output(0))
        .param(io.outputs[0].elements())
        .param(turns)
        .param(FACTOR)
        .param(OFFSET)
}
