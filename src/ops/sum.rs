//! Sums and means over axes, and the repetition that undoes them.

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks, in_blocks, items_per_chunk};
use crate::ops::host_sum::{sum_of, sum_terms};
use crate::ops::spread::{ENOUGH_ROWS, LONGEST_LANE, row_by_invocation};
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, shader};
use crate::tensor::{DType, Shape, TensorType};

const WORKGROUP: usize = 64;
/// Terms that one workgroup adds up; a longer sum takes further passes over the partial sums.
const CHUNK: usize = 4096;
/// Terms that one invocation adds up where that leaves enough for the others to do.
const ROW_CHUNK: usize = 1024;
/// The fewest terms of a column that are worth a partial sum.
const COLUMN_CHUNK: usize = 64;
/// Partial sums of a column that are enough.
const COLUMN_CHUNKS: usize = 512;
/// Neighbouring sums that are worth an invocation for every four of them on a GPU, which reads memory in pieces of 128 bytes and more.
const COLUMNS: usize = 64;

/// Sums over neighbouring axes: the operand is `[outer, terms, inner]`, the result `[outer, inner]` in `shape`.
#[derive(Clone, Debug)]
struct Sum {
    outer: usize,
    terms: usize,
    inner: usize,
    shape: Shape,
}

/// The other way round: each element `terms` times.
#[derive(Clone, Debug)]
struct Repeat {
    outer: usize,
    terms: usize,
    inner: usize,
    shape: Shape,
}

/// One launch of a sum: the entry point, and the terms that it adds up to one number.
#[derive(Clone, Copy, Debug)]
struct Pass {
    entry: &'static str,
    per_chunk: usize,
}

impl Pass {
    fn of([outer, terms, inner]: [usize; 3], capabilities: &Capabilities) -> Self {
        let software = capabilities.class == AdapterClass::Software;
        if inner.is_multiple_of(4) && (software || inner >= COLUMNS) {
            return Self {
                entry: "columns",
                per_chunk: terms.div_ceil(COLUMN_CHUNKS).max(COLUMN_CHUNK),
            };
        }
        let per_row = if outer >= ENOUGH_ROWS {
            LONGEST_LANE
        } else {
            ROW_CHUNK
        };
        let rows = outer * terms.div_ceil(per_row);
        let whole = terms.is_multiple_of(4);
        if inner == 1 && whole && row_by_invocation([rows, per_row.min(terms)], capabilities) {
            return Self {
                entry: "rows",
                per_chunk: per_row,
            };
        }
        Self {
            entry: "forward",
            per_chunk: CHUNK,
        }
    }

    fn chunks(self, terms: usize) -> usize {
        terms.div_ceil(self.per_chunk).max(1)
    }
}

impl Graph {
    /// The sum over the axes named; they disappear from the shape. The order of the additions is fixed.
    ///
    /// # Errors
    /// [`Error::Shape`] if an axis does not exist.
    pub fn sum(&mut self, x: Value, axes: &[usize]) -> Result<Value> {
        let kept: Vec<usize> = {
            let dims = self.ty(x)?.dims();
            if let Some(axis) = axes.iter().find(|&&axis| axis >= dims.len()) {
                return Err(Error::shape(
                    "sum",
                    format!("{} has no axis {axis}", self.ty(x)?),
                ));
            }
            dims.iter()
                .enumerate()
                .filter(|(axis, _)| !axes.contains(axis))
                .map(|(_, &extent)| extent)
                .collect()
        };
        let kept_dims = self.sum_kept(x, axes)?;
        self.reshape(kept_dims, kept)
    }

    /// As [`Graph::sum`], the axes staying as extents of 1: one operation for each run of neighbouring axes.
    fn sum_kept(&mut self, x: Value, axes: &[usize]) -> Result<Value> {
        let mut x = x;
        let rank = self.ty(x)?.shape.rank();
        let mut end = rank;
        while end > 0 {
            if !axes.contains(&(end - 1)) {
                end -= 1;
                continue;
            }
            let start = (0..end)
                .rev()
                .take_while(|axis| axes.contains(axis))
                .last()
                .unwrap_or(end - 1);
            let mut dims = self.ty(x)?.dims().to_vec();
            let op = Sum {
                outer: dims[..start].iter().product(),
                terms: dims[start..end].iter().product(),
                inner: dims[end..].iter().product(),
                shape: {
                    dims[start..end].fill(1);
                    dims.into()
                },
            };
            x = self.apply1(op, &[x])?;
            end = start;
        }
        Ok(x)
    }

    /// The sum of all elements, a scalar.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` holds integers.
    pub fn sum_all(&mut self, x: Value) -> Result<Value> {
        let axes: Vec<usize> = (0..self.ty(x)?.shape.rank()).collect();
        self.sum(x, &axes)
    }

    /// The mean of all elements, a scalar.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` holds integers.
    pub fn mean_all(&mut self, x: Value) -> Result<Value> {
        let count = self.ty(x)?.elements();
        let sum = self.sum_all(x)?;
        self.scale(sum, 1.0 / count as f32)
    }

    /// Sums a tensor down to a shape that broadcasts to its own: the gradient of broadcasting.
    ///
    /// # Errors
    /// [`Error::Shape`] if `shape` does not broadcast to the shape of `x`.
    pub fn sum_to(&mut self, x: Value, shape: &Shape) -> Result<Value> {
        let ty = self.ty(x)?.clone();
        if ty.shape == *shape {
            return Ok(x);
        }
        if shape.broadcast(&ty.shape).as_ref() != Some(&ty.shape) {
            return Err(Error::shape(
                "sum_to",
                format!("{shape} does not broadcast to {ty}"),
            ));
        }
        let missing = ty.shape.rank() - shape.rank();
        let axes: Vec<usize> = (0..ty.shape.rank())
            .filter(|&axis| {
                axis < missing || (shape.dims()[axis - missing] == 1 && ty.dims()[axis] != 1)
            })
            .collect();
        let summed = self.sum_kept(x, &axes)?;
        self.reshape(summed, shape)
    }
}

impl Sum {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        let sizes = [self.outer, self.terms, self.inner];
        sum_terms(sizes, io.floats_out(0)?, |rows, columns, sums| {
            if self.inner == 1 {
                sums[0] += sum_of([&x[rows]], |[x]| x);
                return;
            }
            for row in rows {
                let x = &x[row * self.inner..][columns.clone()];
                for (sum, &x) in sums.iter_mut().zip(x) {
                    *sum += x;
                }
            }
        });
        Ok(())
    }
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(io.inputs[0].elements()))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        Ok(vec![TensorType::f32(&self.shape)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let shape = context.graph.ty(context.input(0))?.shape.clone();
        let op = Repeat {
            outer: self.outer,
            terms: self.terms,
            inner: self.inner,
            shape,
        };
        let dx = context.graph.apply1(op, &[dy])?;
        context.add(0, dx)
    }

    fn launches(&self, _io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let mut launches = Launches::default();
        let (mut from, mut shape) = (Slot::Input(0), [self.outer, self.terms, self.inner]);
        loop {
            let pass = Pass::of(shape, capabilities);
            let [outer, terms, inner] = shape;
            let chunks = pass.chunks(terms);
            let sums = outer * inner * chunks;
            let to = match chunks {
                1 => Slot::Output(0),
                _ => launches.scratch_words(sums),
            };
            let launch = Launch::new(shader!("sum", "reduce"), pass.entry);
            let (launch, invocations) = match pass.entry {
                "forward" => (launch.read(1, from).write(2, to), sums * WORKGROUP),
                "rows" => (launch.read(3, from).write(2, to), sums),
                _ => (launch.read(3, from).write(4, to), sums / 4),
            };
            let launch = launch
                .param(outer * inner)
                .param(terms)
                .param(inner)
                .param(chunks)
                .param(pass.per_chunk)
                .folded(invocations.div_ceil(WORKGROUP), capabilities)?;
            launches.launches.push(launch);
            if chunks == 1 {
                return Ok(launches);
            }
            (from, shape) = match pass.entry {
                "columns" => (to, [outer, chunks, inner]),
                _ => (to, [outer * inner, chunks, 1]),
            };
        }
    }

    host_reference!();
}

impl Repeat {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let x = io.floats(0)?;
        let y = io.floats_out(0)?;
        if self.inner == 1 {
            for_chunks(y.len(), LIGHT_CHUNK, [y], |at, [mut y]| {
                for (outer, terms) in in_blocks(at, self.terms) {
                    let (here, rest) = y.split_at_mut(terms.len());
                    here.fill(x[outer]);
                    y = rest;
                }
            });
            return Ok(());
        }
        let per_chunk = items_per_chunk(LIGHT_CHUNK, self.inner);
        for_chunks(self.outer * self.terms, per_chunk, [y], |rows, [y]| {
            for (row, y) in rows.zip(y.chunks_mut(self.inner)) {
                y.copy_from_slice(&x[row / self.terms * self.inner..][..self.inner]);
            }
        });
        Ok(())
    }
}

impl Op for Repeat {
    fn name(&self) -> &'static str {
        "repeat"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the operand", &inputs[0], DType::F32)?;
        Ok(vec![TensorType::f32(&self.shape)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let shape = context.graph.ty(context.input(0))?.shape.clone();
        let op = Sum {
            outer: self.outer,
            terms: self.terms,
            inner: self.inner,
            shape,
        };
        let dx = context.graph.apply1(op, &[dy])?;
        context.add(0, dx)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("sum", "reduce"), "repeat")
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .param(elements)
            .param(self.terms)
            .param(self.inner)
            .param(1_usize)
            .param(self.terms)
            .folded(elements.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
