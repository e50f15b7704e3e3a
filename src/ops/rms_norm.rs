//! Normalisation of rows by their root mean square.

use rayon::prelude::*;

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_sum::{sum_of, sum_terms};
use crate::ops::spread::{ROW_LANES, row_by_invocation};
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32, row_workgroup, shader,
};
use crate::tensor::TensorType;

/// Invocations that stand side by side on columns while the gradient of the weight is summed.
const COLUMNS: usize = 64;
/// The fewest rows that are worth a partial sum of the weight's gradient.
const SMALLEST_CHUNK: usize = 32;
/// Partial sums that are enough where an invocation has four columns.
const MOST_CHUNKS: usize = 512;

/// Results: y, and the inverse root mean square of every row.
#[derive(Clone, Copy, Debug)]
struct RmsNorm {
    epsilon: f32,
}

/// The gradient of x. Operands x, weight, inverse, dy.
#[derive(Clone, Copy, Debug)]
struct InputGradient;

/// The gradient of the weight. Operands x, inverse, dy.
#[derive(Clone, Copy, Debug)]
struct WeightGradient;

impl Graph {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`, the mean over each row: `x` and the result are `[rows, n]`, `weight` is `[n]`
    /// (Zhang and Sennrich 2019, arXiv 1910.07467). The gradients of `x` and of `weight` are separate operations: a frozen
    /// weight costs nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operands have other shapes, [`Error::Setting`] if `epsilon` is not a positive normal number: a row
    /// of zeros would have no finite inverse.
    pub fn rms_norm(&mut self, x: Value, weight: Value, epsilon: f32) -> Result<Value> {
        if !epsilon.is_normal() || epsilon < 0.0 {
            return Err(Error::setting(
                "epsilon",
                epsilon,
                "rms_norm needs a positive normal number",
            ));
        }
        self.apply1(RmsNorm { epsilon }, &[x, weight])
    }
}

/// A launch with the bindings still to be named; all entry points share one set of parameters.
fn launch(
    entry: &'static str,
    [rows, n]: [usize; 2],
    epsilon: f32,
    rows_per_chunk: usize,
) -> Launch {
    Launch::new(shader!("rms_norm", "reduce"), entry)
        .param(rows)
        .param(n)
        .param(epsilon)
        .param(rows_per_chunk)
        .param(rows.div_ceil(rows_per_chunk))
}

impl RmsNorm {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (x, weight) = (io.floats(0)?, io.floats(1)?);
        let n = weight.len();
        let (y, inverse) = (io.floats_out(0)?, io.floats_out(1)?);
        let epsilon = R::of(f64::from(self.epsilon));
        let rows = x
            .par_chunks_exact(n)
            .zip(y.par_chunks_exact_mut(n))
            .zip(inverse.par_iter_mut());
        rows.for_each(|((x, y), inverse)| {
            let squares = sum_of([x], |[x]| x * x);
            *inverse = (squares / R::of(n as f64) + epsilon).sqrt().recip();
            for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * *inverse * weight;
            }
        });
        Ok(())
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The sum of squares, two products; each row's mean, epsilon, root and inverse.
        let [rows, n] = dims_f32(self.name(), "x", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(rows * (4 * n + 4)))
    }

    fn keeps_f32(&self, output: usize) -> bool {
        output == 1
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [rows, n] = dims_f32(self.name(), "x", &inputs[0])?;
        expect_f32(self.name(), "the weight", &inputs[1], &[n])?;
        Ok(vec![inputs[0].clone(), TensorType::f32([rows])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let (x, weight, inverse) = (context.input(0), context.input(1), context.output(1));
        if context.wants(0) {
            let dx = context
                .graph
                .apply1(InputGradient, &[x, weight, inverse, dy])?;
            context.add(0, dx)?;
        }
        if context.wants(1) {
            let dw = context.graph.apply1(WeightGradient, &[x, inverse, dy])?;
            context.add(1, dw)?;
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, n] = dims_f32(self.name(), "x", &io.inputs[0])?;
        let launch = if row_by_invocation([rows, n], capabilities) {
            launch("four_forward", [rows, n], self.epsilon, rows)
                .constant("WORKGROUP", ROW_LANES as u32)
                .read(8, Slot::Input(0))
                .read(9, Slot::Input(1))
                .write(12, Slot::Output(0))
                .write(7, Slot::Output(1))
                .folded(rows.div_ceil(ROW_LANES), capabilities)?
        } else {
            launch("forward", [rows, n], self.epsilon, rows)
                .constant("WORKGROUP", row_workgroup(n, capabilities))
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .write(6, Slot::Output(0))
                .write(7, Slot::Output(1))
                .folded(rows, capabilities)?
        };
        Ok(launch.into())
    }

    host_reference!();
}

impl InputGradient {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (x, weight, inverse, dy) = (io.floats(0)?, io.floats(1)?, io.floats(2)?, io.floats(3)?);
        let n = weight.len();
        let dx = io.floats_out(0)?;
        let rows = x
            .par_chunks_exact(n)
            .zip(dy.par_chunks_exact(n))
            .zip(inverse)
            .zip(dx.par_chunks_exact_mut(n));
        rows.for_each(|(((x, dy), &inverse), dx)| {
            let products = sum_of([x, dy, weight], |[x, dy, weight]| dy * weight * x * inverse);
            let mean = products / R::of(n as f64);
            for (((dx, &x), &dy), &weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx = inverse * (dy * weight - x * inverse * mean);
            }
        });
        Ok(())
    }
}

impl Op for InputGradient {
    fn name(&self) -> &'static str {
        "rms_norm_input_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // dy w, its sum with x, the difference to a multiple of x, the product; each row's factors.
        let [rows, n] = dims_f32(self.name(), "x", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(rows * (6 * n + 3)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4)?;
        let [rows, n] = dims_f32(self.name(), "x", &inputs[0])?;
        expect_f32(self.name(), "the weight", &inputs[1], &[n])?;
        expect_f32(self.name(), "the inverse", &inputs[2], &[rows])?;
        expect_f32(self.name(), "dy", &inputs[3], &[rows, n])?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, n] = dims_f32(self.name(), "x", &io.inputs[0])?;
        let launch = if row_by_invocation([rows, n], capabilities) {
            launch("four_input_gradient", [rows, n], 0.0, rows)
                .constant("WORKGROUP", ROW_LANES as u32)
                .read(8, Slot::Input(0))
                .read(9, Slot::Input(1))
                .read(3, Slot::Input(2))
                .read(10, Slot::Input(3))
                .write(12, Slot::Output(0))
                .folded(rows.div_ceil(ROW_LANES), capabilities)?
        } else {
            launch("input_gradient", [rows, n], 0.0, rows)
                .constant("WORKGROUP", row_workgroup(n, capabilities))
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .read(3, Slot::Input(2))
                .read(4, Slot::Input(3))
                .write(6, Slot::Output(0))
                .folded(rows, capabilities)?
        };
        Ok(launch.into())
    }

    host_reference!();
}

impl WeightGradient {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (x, inverse, dy) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let dw = io.floats_out(0)?;
        let n = dw.len();
        sum_terms([1, inverse.len(), n], dw, |rows, columns, dw| {
            for row in rows {
                let [x, dy] = [x, dy].map(|x| &x[row * n..][columns.clone()]);
                for ((dw, &x), &dy) in dw.iter_mut().zip(x).zip(dy) {
                    *dw += dy * x * inverse[row];
                }
            }
        });
        Ok(())
    }
}

impl Op for WeightGradient {
    fn name(&self) -> &'static str {
        "rms_norm_weight_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // dy x times the inverse, and its sum.
        Ok(Work::moving(io).with_flops(3 * io.inputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [rows, n] = dims_f32(self.name(), "x", &inputs[0])?;
        expect_f32(self.name(), "the inverse", &inputs[1], &[rows])?;
        expect_f32(self.name(), "dy", &inputs[2], &[rows, n])?;
        Ok(vec![TensorType::f32([n])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, n] = dims_f32(self.name(), "x", &io.inputs[0])?;
        // Four columns an invocation where a row is a whole number of vec4s, on software adapters: GPUs want many invocations more than
        // long reads.
        let four = capabilities.class == AdapterClass::Software && n.is_multiple_of(4);
        let (kernels, bindings, rows_per_chunk) = if four {
            let rows_per_chunk = rows.div_ceil(MOST_CHUNKS).max(SMALLEST_CHUNK);
            let kernels = ["four_weight_partial", "four_weight_total"];
            (kernels, [8, 10, 11, 12], rows_per_chunk)
        } else {
            let rows_per_chunk = rows.isqrt().max(SMALLEST_CHUNK);
            let kernels = ["weight_partial", "weight_total"];
            (kernels, [1, 4, 5, 6], rows_per_chunk)
        };
        let [x, dy, partial_sums, result] = bindings;
        let chunks = rows.div_ceil(rows_per_chunk);
        let groups = |chunks: usize| match four {
            true => (n / 4 * chunks).div_ceil(COLUMNS),
            false => n.div_ceil(COLUMNS) * chunks,
        };
        let sum_chunks = |to: Slot| {
            launch(kernels[0], [rows, n], 0.0, rows_per_chunk)
                .constant("WORKGROUP", COLUMNS as u32)
                .read(x, Slot::Input(0))
                .read(3, Slot::Input(1))
                .read(dy, Slot::Input(2))
                .write(result, to)
                .folded(groups(chunks), capabilities)
        };
        if chunks == 1 {
            return Ok(sum_chunks(Slot::Output(0))?.into());
        }
        let mut launches = Launches::default();
        let partial = launches.scratch_words(chunks * n);
        launches.launches.push(sum_chunks(partial)?);
        launches.launches.push(
            launch(kernels[1], [rows, n], 0.0, rows_per_chunk)
                .constant("WORKGROUP", COLUMNS as u32)
                .read(partial_sums, partial)
                .write(result, Slot::Output(0))
                .folded(groups(1), capabilities)?,
        );
        Ok(launches)
    }

    host_reference!();
}
