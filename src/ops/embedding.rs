//! Rows of a table by index, and the gradient of the table: sums over the rows sorted by index, without atomics.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks, items_per_chunk};
use crate::ops::host_sum::CHUNK;
use crate::ops::turns::expect_turns;
use crate::ops::{
    HostIo, IndexRange, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_dtype,
    expect_i32, shader,
};
use crate::tensor::{DType, TensorType};

const WORKGROUP: usize = 64;
/// Ids that an invocation adds up in a turn, should all be the same.
const IDS_PER_TURN: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Embedding;

/// Inputs: dy `[count, width]`, order, offsets. Output `[rows, width]`.
#[derive(Clone, Copy, Debug)]
struct EmbeddingGradient;

impl Graph {
    /// Rows of `table` (`[rows, width]`) by `ids` (integers in `0..rows`, any shape): the shape of the ids, then the width.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the table is not a matrix or the ids are not integers.
    pub fn embedding(&mut self, table: Value, ids: Value) -> Result<Value> {
        self.apply1(Embedding, &[table, ids])
    }
}

impl Embedding {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let [rows, width] = dims_f32("embedding", "the table", io.input_type(0)?)?;
        let (table, ids) = (io.floats(0)?, io.ints(1)?);
        let per_chunk = items_per_chunk(LIGHT_CHUNK, width);
        for_chunks(ids.len(), per_chunk, [io.floats_out(0)?], |at, [out]| {
            for (out, &id) in out.chunks_mut(width).zip(&ids[at]) {
                let row = (id.max(0) as usize).min(rows - 1);
                out.copy_from_slice(&table[row * width..(row + 1) * width]);
            }
        });
        Ok(())
    }
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [rows, width] = dims_f32(self.name(), "the table", &io.inputs[0])?;
        let read = rows.min(io.inputs[1].elements());
        Ok(Work::moving(io).reading(0, read * width))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [_, width] = dims_f32(self.name(), "the table", &inputs[0])?;
        expect_dtype(self.name(), "the ids", &inputs[1], DType::I32)?;
        let dims: Vec<usize> = inputs[1].dims().iter().copied().chain([width]).collect();
        Ok(vec![TensorType::f32(dims)])
    }

    fn index_ranges(&self, inputs: &[TensorType]) -> Vec<IndexRange> {
        vec![IndexRange {
            input: 1,
            limit: inputs[0].dims()[0],
            ignored: None,
        }]
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let (table, ids) = (context.input(0), context.input(1));
        let graph = &mut *context.graph;
        let [rows, width] = dims_f32(self.name(), "the table", graph.ty(table)?)?;
        let count = graph.ty(ids)?.elements();
        let sorted = graph.sort_by_key(ids, rows)?;
        let dy = graph.reshape(dy, [count, width])?;
        let gradient = graph.apply1(EmbeddingGradient, &[dy, sorted.order, sorted.offsets])?;
        context.add(0, gradient)
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, width] = dims_f32(self.name(), "the table", &io.inputs[0])?;
        let elements = io.outputs[0].elements();
        let launch = Launch::new(shader!("embedding"), "forward")
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .write(3, Slot::Output(0))
            .param(elements)
            .param(width)
            .param(rows)
            .folded(elements.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

/// The sum of those rows of dy, in chunks: one id may stand for the padding of a whole batch.
fn sum_rows<R: Real>(dy: &[R], positions: &[i32], out: &mut [R]) {
    let width = out.len();
    let add = |positions: &[i32], sums: &mut [R]| {
        sums.fill(R::zero());
        for &position in positions {
            let row = &dy[position as usize * width..][..width];
            for (sum, &dy) in sums.iter_mut().zip(row) {
                *sum += dy;
            }
        }
    };
    if positions.len() <= CHUNK {
        return add(positions, out);
    }
    let mut totals = vec![0.0; width];
    for positions in positions.chunks(CHUNK) {
        add(positions, out);
        for (total, sum) in totals.iter_mut().zip(&*out) {
            *total += sum.f64();
        }
    }
    for (out, total) in out.iter_mut().zip(totals) {
        *out = R::of(total);
    }
}

impl EmbeddingGradient {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let width = io.input_type(0)?.shape.last();
        let (dy, order, offsets) = (io.floats(0)?, io.ints(1)?, io.ints(2)?);
        // A chunk of the table's rows has about as many terms as a chunk of elements, if the ids are spread evenly.
        let per_row = width * order.len().div_ceil(offsets.len() - 1);
        let per_chunk = items_per_chunk(LIGHT_CHUNK, per_row.max(width));
        let out = [io.floats_out(0)?];
        for_chunks(offsets.len() - 1, per_chunk, out, |rows, [out]| {
            let ends = offsets[rows.start..=rows.end].windows(2);
            for (out, ends) in out.chunks_mut(width).zip(ends) {
                let positions = &order[ends[0] as usize..ends[1] as usize];
                sum_rows(dy, positions, out);
            }
        });
        Ok(())
    }
}

impl Op for EmbeddingGradient {
    fn name(&self) -> &'static str {
        "embedding_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving(io).with_flops(io.inputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [count, width] = dims_f32(self.name(), "the gradient", &inputs[0])?;
        expect_i32(self.name(), "the order", &inputs[1], &[count])?;
        expect_dtype(self.name(), "the offsets", &inputs[2], DType::I32)?;
        Ok(vec![TensorType::f32([inputs[2].elements() - 1, width])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, width] = dims_f32(self.name(), "the gradient", &io.outputs[0])?;
        let places = io.inputs[1].elements();
        expect_turns(self.name(), [places, IDS_PER_TURN], "ids", capabilities)?;
        let launch = Launch::new(shader!("embedding"), "backward")
            .read(1, Slot::Input(0))
            .read(4, Slot::Input(1))
            .read(5, Slot::Input(2))
            .write(3, Slot::Output(0))
            .param(rows * width)
            .param(width)
            .param(rows)
            .folded((rows * width).div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
