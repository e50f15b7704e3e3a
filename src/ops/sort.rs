//! The stable sort of indices by key: (token, slot) pairs by expert, rows by token id. What every grouped kernel gathers through.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::sort_block::{MOST_DIGITS, SortBlock, WORKGROUP};
use crate::ops::{HostIo, IndexRange, LaunchTypes, Op, Real, expect_count, expect_dtype, shader};
use crate::tensor::{DType, TensorType};

/// The largest workgroup that every WebGPU device allows: the scan is one workgroup.
const SCAN_WORKGROUP: usize = 256;

/// Indices sorted by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sorted {
    /// The positions of the keys, `i32 [count]`, those of smaller keys first, those of equal keys in their own order.
    pub order: Value,
    /// Where each key's segment of `order` starts, `i32 [limit + 1]`; the last entry is the count.
    pub offsets: Value,
}

/// Operand keys. Results order, offsets.
#[derive(Clone, Copy, Debug)]
struct Sort {
    limit: usize,
}

impl Graph {
    /// Sorts the positions of `keys` (integers in `0..limit`, any shape) by key, stably and without reading anything back.
    ///
    /// # Errors
    /// [`Error::Shape`] if the keys are floats, [`Error::Setting`] if `limit` is 0.
    pub fn sort_by_key(&mut self, keys: Value, limit: usize) -> Result<Sorted> {
        let outputs = self.apply(Sort { limit }, &[keys])?;
        Ok(Sorted {
            order: outputs[0],
            offsets: outputs[1],
        })
    }
}

/// The sort on the host. A key that is out of range counts as the nearest that is not.
pub(crate) fn host_sort(keys: &[i32], limit: usize, order: &mut [i32], offsets: &mut [i32]) {
    offsets.fill(0);
    let bucket = |key: i32| (key.max(0) as usize).min(limit - 1);
    for &key in keys {
        offsets[bucket(key) + 1] += 1;
    }
    for key in 0..limit {
        offsets[key + 1] += offsets[key];
    }
    let mut next = offsets.to_vec();
    for (position, &key) in keys.iter().enumerate() {
        let place = &mut next[bucket(key)];
        order[*place as usize] = position as i32;
        *place += 1;
    }
}

impl Sort {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (order, offsets) = (io.ints_out(0)?, io.ints_out(1)?);
        host_sort(io.ints(0)?, self.limit, order, offsets);
        Ok(())
    }

    /// All of it by one workgroup.
    fn whole(&self, count: usize, block: SortBlock) -> Launch {
        self.launch("whole", count, block, 0, 1)
            .constant("CELLS", block.cells() as f64)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1))
            // The last parameter is how grids are folded.
            .param(1_usize)
    }

    /// A launch with the bindings, and how its grid is folded, still to be named.
    fn launch(
        &self,
        entry: &'static str,
        count: usize,
        block: SortBlock,
        shift: usize,
        blocks: usize,
    ) -> Launch {
        Launch::new(shader!("sort", "sort_block"), entry)
            .constant("WORKGROUP", WORKGROUP as f64)
            .param(count)
            .param(self.limit)
            .param(block.digits)
            .param(shift)
            .param(block.chunks)
            .param(block.share)
            .param(blocks)
    }
}

impl Op for Sort {
    fn name(&self) -> &'static str {
        "sort"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        expect_dtype(self.name(), "the keys", &inputs[0], DType::I32)?;
        if self.limit == 0 || self.limit >= i32::MAX as usize {
            return Err(Error::setting(
                "limit",
                self.limit,
                "keys need between 1 and 2^31 - 2 values",
            ));
        }
        Ok(vec![
            TensorType::i32([inputs[0].elements()]),
            TensorType::i32([self.limit + 1]),
        ])
    }

    fn differentiable(&self, _input: usize) -> bool {
        false
    }

    fn index_ranges(&self, _inputs: &[TensorType]) -> Vec<IndexRange> {
        vec![IndexRange {
            input: 0,
            limit: self.limit,
            ignored: None,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let count = io.inputs[0].elements();
        if let Some(block) = SortBlock::of_all(self.limit, count) {
            return Ok(self.whole(count, block).into());
        }
        // Digits of equal width, so that none has more values than it needs.
        let bits = (usize::BITS - (self.limit - 1).leading_zeros()) as usize;
        let passes = bits.div_ceil(MOST_DIGITS.ilog2() as usize).max(1);
        let width = bits.div_ceil(passes);
        let digits = if passes == 1 { self.limit } else { 1 << width };
        let block = SortBlock::of_many(digits, count);
        let blocks = count.div_ceil(block.chunks * block.share);
        let mut launches = Launches::default();
        let counts = launches.scratch_words(digits * blocks);
        let halves = match passes {
            1 => [Slot::Output(0); 2],
            2 => [launches.scratch_words(count), Slot::Output(0)],
            _ => [launches.scratch_words(count), launches.scratch_words(count)],
        };
        for pass in 0..passes {
            let from = if pass == 0 {
                Slot::Input(0)
            } else {
                halves[(pass - 1) % 2]
            };
            let to = if pass + 1 == passes {
                Slot::Output(0)
            } else {
                halves[pass % 2]
            };
            let launch = |entry| {
                self.launch(entry, count, block, pass * width, blocks)
                    .constant("FIRST_PASS", pass == 0)
                    .constant("ONLY_PASS", passes == 1)
            };
            let gather = |launch: Launch| {
                launch
                    .constant("CELLS", block.cells() as f64)
                    .read(1, Slot::Input(0))
                    .read(2, from)
            };
            let count = gather(launch("count")).write(3, counts);
            launches.launches.push(count.folded(blocks, capabilities)?);
            let scan = launch("scan")
                .constant("SCAN_WORKGROUP", SCAN_WORKGROUP as f64)
                .write(3, counts);
            launches.launches.push(scan.folded(1, capabilities)?);
            let scatter = gather(launch("scatter"))
                .write(3, counts)
                .write(4, to)
                .write(5, Slot::Output(1));
            launches
                .launches
                .push(scatter.folded(blocks, capabilities)?);
        }
        if passes > 1 {
            let boundaries = self
                .launch("boundaries", count, block, 0, blocks)
                .read(1, Slot::Input(0))
                .read(2, Slot::Output(0))
                .write(5, Slot::Output(1));
            let groups = (self.limit + 1).div_ceil(WORKGROUP);
            launches
                .launches
                .push(boundaries.folded(groups, capabilities)?);
        }
        Ok(launches)
    }

    host_reference!();
}
