//! The plan of a compiled graph: which operations run, and in which memory each value lives.
//!
//! Values that are never alive together share a buffer. Buffers are whole: a binding never starts inside one, because wgpu refuses
//! a buffer that one dispatch reads and writes, even at disjoint ranges.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::device::{BUFFER_ALIGNMENT, Capabilities, Launches};
use crate::error::{Error, Result};
use crate::graph::halves::{Operands, behind_key, lower, stored_types};
use crate::graph::{Graph, Source, Storage, Value};
use crate::ops::{AliasKind, LaunchTypes};
use crate::tensor::{DType, TensorType};

/// Where a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// A buffer of the session that values share.
    Pool(usize),
    /// The buffer of an input, by the input's value.
    Input(u32),
    /// The buffer of a constant, by the constant's value.
    Constant(u32),
    /// A parameter of the store, by its number in the graph.
    Parameter(usize),
}

/// One operation of the plan.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) node: usize,
    /// Copies to make before, as values: from, to. The value copied stays as it is.
    pub(crate) copies: Vec<(u32, u32)>,
    pub(crate) inputs: Vec<Place>,
    pub(crate) outputs: Vec<Place>,
    pub(crate) launches: Launches,
    pub(crate) scratch: Vec<Place>,
}

/// What memory a session needs on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MemoryReport {
    /// Bytes of the parameters, optimiser state included; in the store, shared with other sessions.
    pub parameters: u64,
    /// Bytes of inputs and constants.
    pub inputs: u64,
    /// Bytes of the buffers that computed values share.
    pub pool: u64,
    /// What the pool would be if [`Graph::recompute`] kept everything; `pool` itself where nothing is recomputed.
    pub pool_without_recomputation: u64,
    /// The largest sum of bytes of values alive at one time: no plan could do with a smaller pool.
    pub pool_lower_bound: u64,
    /// How many buffers the pool has.
    pub pool_buffers: usize,
    /// How many values share them.
    pub pool_values: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) places: Vec<Option<Place>>,
    /// What each value's floats are stored in.
    pub(crate) storages: Vec<Storage>,
    /// Values with the same number share memory throughout their lives (views, in-place results).
    pub(crate) classes: Vec<usize>,
    /// The size of each pool buffer in bytes.
    pub(crate) pool: Vec<u64>,
    /// Inputs that something uses: values.
    pub(crate) inputs: Vec<u32>,
    pub(crate) constants: Vec<u32>,
    pub(crate) parameters: Vec<usize>,
    pub(crate) memory: MemoryReport,
}

/// Memory wanted from step `first` to step `last`.
struct Block {
    bytes: u64,
    first: usize,
    last: usize,
}

/// What the plan is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// `None` for the host, which launches nothing.
    pub(crate) capabilities: Option<&'a Capabilities>,
    /// The size of a float.
    pub(crate) float_bytes: u64,
}

impl Target<'_> {
    pub(crate) fn bytes(&self, ty: &TensorType, storage: Storage) -> u64 {
        let element = match (ty.dtype, storage) {
            (DType::I32, _) => 4,
            // The reference computes and stores in 64 bits whatever a graph asks for.
            (_, Storage::F16) if self.float_bytes == 4 => 2,
            _ => self.float_bytes,
        };
        (ty.elements() as u64 * element).next_multiple_of(BUFFER_ALIGNMENT)
    }
}

/// The end of time: for values that the session keeps.
const FOREVER: usize = usize::MAX;

/// Places the values of a graph, of which those at `storages` are given.
pub(crate) fn plan(graph: &Graph, target: Target<'_>, storages: Vec<Storage>) -> Result<Plan> {
    let without = match graph.without_recomputation() {
        Some(kept) => Some(plan_as_built(&kept, target, storages.clone())?.memory.pool),
        None => None,
    };
    let mut plan = plan_as_built(graph, target, storages)?;
    if let Some(pool) = without {
        plan.memory.pool_without_recomputation = pool;
    }
    Ok(plan)
}

fn plan_as_built(graph: &Graph, target: Target<'_>, storages: Vec<Storage>) -> Result<Plan> {
    let live = live_nodes(graph);
    let mut classes = Classes::new(graph, &live)?;
    let mut steps = Vec::with_capacity(live.len());
    let mut blocks: Vec<Block> = Vec::new();
    let mut scratch_blocks = Vec::new();

    // Aliases, in order: an output takes over the memory of an input that dies here.
    let mut copies_of = Vec::with_capacity(live.len());
    for (time, &node) in live.iter().enumerate() {
        let info = &graph.nodes[node];
        let mut copies = Vec::new();
        for alias in info.op.aliases() {
            if alias.kind != AliasKind::Accumulate {
                continue;
            }
            let (input, output) = (info.inputs[alias.input], info.outputs[alias.output]);
            let shared_elsewhere = info.inputs.iter().enumerate().any(|(other, &value)| {
                other != alias.input && classes.find(value) == classes.find(input)
            });
            if graph.is_computed(input)
                && !classes.is_fixed(input)
                && !shared_elsewhere
                && classes.last(input) == time
            {
                classes.join(input, output);
            } else {
                copies.push((input, output));
            }
        }
        copies_of.push(copies);
    }

    // Sizes and lifetimes of what must be placed.
    let mut block_of_class = vec![None; graph.values.len()];
    for (time, &node) in live.iter().enumerate() {
        for &output in &graph.nodes[node].outputs {
            let class = classes.find(output);
            if classes.is_fixed(output) || block_of_class[class].is_some() {
                continue;
            }
            let index = output.index as usize;
            let bytes = target.bytes(&graph.values[index].ty, storages[index]);
            block_of_class[class] = Some(blocks.len());
            blocks.push(Block {
                bytes,
                first: time,
                last: classes.last(output).max(time),
            });
        }
    }
    for (time, &node) in live.iter().enumerate() {
        let info = &graph.nodes[node];
        let launches = match target.capabilities {
            Some(capabilities) => {
                let [inputs, outputs] = [&info.inputs, &info.outputs]
                    .map(|values| stored_types(graph, &storages, values));
                let behind = behind_key(&inputs, &outputs);
                let (inputs, input_storages): (Vec<_>, Vec<_>) = inputs.into_iter().unzip();
                let (outputs, output_storages): (Vec<_>, Vec<_>) = outputs.into_iter().unzip();
                let aliases = info.op.aliases();
                let continued: Vec<usize> = aliases.iter().map(|alias| alias.output).collect();
                let stored_so;
                let capabilities = if behind.is_empty() || capabilities.kernels.is_empty() {
                    capabilities
                } else {
                    stored_so = Capabilities {
                        kernels: capabilities.kernels.with_behind(behind),
                        ..capabilities.clone()
                    };
                    &stored_so
                };
                let launches = info.op.launches(
                    LaunchTypes {
                        inputs: &inputs,
                        outputs: &outputs,
                    },
                    capabilities,
                )?;
                let operands = Operands {
                    inputs: &input_storages,
                    outputs: &output_storages,
                    output_types: &outputs,
                    continued: &continued,
                };
                lower(launches, &operands, capabilities)?
            }
            None => Launches::default(),
        };
        let first_scratch = blocks.len();
        for &bytes in &launches.scratch {
            let bytes = bytes.next_multiple_of(BUFFER_ALIGNMENT);
            blocks.push(Block {
                bytes,
                first: time,
                last: time,
            });
        }
        scratch_blocks.push((launches, first_scratch..blocks.len()));
    }

    let (pool, pool_of_block) = assign(&blocks);
    let classes_of: Vec<usize> = (0..graph.values.len())
        .map(|index| {
            classes.find(Value {
                graph: graph.id,
                index: index as u32,
            })
        })
        .collect();
    let places: Vec<Option<Place>> = classes_of
        .iter()
        .map(|&class| {
            let pooled = || block_of_class[class].map(|block| Place::Pool(pool_of_block[block]));
            classes.fixed[class].or_else(pooled)
        })
        .collect();
    let place = |value: Value| {
        places[value.index as usize].ok_or_else(|| Error::NotKept {
            value: graph.describe(value),
        })
    };
    for ((&node, (launches, scratch)), copies) in live.iter().zip(scratch_blocks).zip(copies_of) {
        let info = &graph.nodes[node];
        steps.push(Step {
            node,
            copies: copies
                .iter()
                .map(|(from, to)| (from.index, to.index))
                .collect(),
            inputs: info
                .inputs
                .iter()
                .map(|&value| place(value))
                .collect::<Result<_>>()?,
            outputs: info
                .outputs
                .iter()
                .map(|&value| place(value))
                .collect::<Result<_>>()?,
            launches,
            scratch: scratch
                .map(|block| Place::Pool(pool_of_block[block]))
                .collect(),
        });
    }

    let used: BTreeSet<Place> = steps
        .iter()
        .flat_map(|step| step.inputs.iter().chain(&step.outputs))
        .copied()
        .chain(
            graph
                .outputs
                .iter()
                .filter_map(|value| places[value.index as usize]),
        )
        .collect();
    let mut plan = Plan {
        steps,
        places,
        storages,
        classes: classes_of,
        pool,
        inputs: vec![],
        constants: vec![],
        parameters: vec![],
        memory: MemoryReport::default(),
    };
    for place in used {
        match place {
            Place::Pool(_) => {}
            Place::Input(index) => plan.inputs.push(index),
            Place::Constant(index) => plan.constants.push(index),
            Place::Parameter(index) => plan.parameters.push(index),
        }
    }
    let value_bytes = |index: &u32| target.bytes(&graph.values[*index as usize].ty, Storage::F32);
    plan.memory = MemoryReport {
        parameters: plan
            .parameters
            .iter()
            .map(|&index| {
                let spec = &graph.parameters[index];
                let value = graph.names[&spec.name].index as usize;
                target.bytes(&spec.ty, plan.storages[value])
            })
            .sum(),
        inputs: plan
            .inputs
            .iter()
            .chain(&plan.constants)
            .map(value_bytes)
            .sum(),
        pool: plan.pool.iter().sum(),
        pool_without_recomputation: plan.pool.iter().sum(),
        pool_lower_bound: lower_bound(&blocks, live.len()),
        pool_buffers: plan.pool.len(),
        pool_values: blocks.len(),
    };
    Ok(plan)
}

/// The nodes that an output or a parameter update depends on, in order.
pub(crate) fn live_nodes(graph: &Graph) -> Vec<usize> {
    let mut needed = vec![false; graph.values.len()];
    for value in &graph.outputs {
        needed[value.index as usize] = true;
    }
    let mut live = Vec::new();
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        let updates = node
            .op
            .aliases()
            .iter()
            .any(|alias| alias.kind == AliasKind::Update);
        if updates
            || node
                .outputs
                .iter()
                .any(|output| needed[output.index as usize])
        {
            for input in &node.inputs {
                needed[input.index as usize] = true;
            }
            live.push(index);
        }
    }
    live.reverse();
    live
}

/// Values that share memory, as a union-find forest.
struct Classes {
    parent: Vec<usize>,
    last: Vec<usize>,
    /// Memory outside the pool, by root.
    fixed: Vec<Option<Place>>,
}

impl Classes {
    fn new(graph: &Graph, live: &[usize]) -> Result<Self> {
        let count = graph.values.len();
        let mut classes = Self {
            parent: (0..count).collect(),
            last: vec![0; count],
            fixed: vec![None; count],
        };
        for (index, info) in graph.values.iter().enumerate() {
            classes.fixed[index] = match info.source {
                Source::Input(_) => Some(Place::Input(index as u32)),
                Source::Constant(_) => Some(Place::Constant(index as u32)),
                Source::Parameter(parameter) => Some(Place::Parameter(parameter)),
                Source::Node { .. } => None,
            };
        }
        let mut stale = vec![false; count];
        for (time, &node) in live.iter().enumerate() {
            let info = &graph.nodes[node];
            for &input in &info.inputs {
                if stale[input.index as usize] {
                    return Err(Error::shape(
                        info.op.name(),
                        format!(
                            "reads {} after an update: use the updated value",
                            graph.describe(input)
                        ),
                    ));
                }
                let root = classes.find(input);
                classes.last[root] = classes.last[root].max(time);
            }
            for &output in &info.outputs {
                classes.last[output.index as usize] = time;
            }
            for alias in info.op.aliases() {
                match alias.kind {
                    AliasKind::View => {
                        classes.join(info.inputs[alias.input], info.outputs[alias.output]);
                    }
                    AliasKind::Update => {
                        classes.join(info.inputs[alias.input], info.outputs[alias.output]);
                        // The parameter's older states, and every view of them.
                        let root = classes.find(info.outputs[alias.output]);
                        for (index, stale) in stale.iter_mut().enumerate() {
                            *stale |= classes.root(index) == root;
                        }
                        stale[info.outputs[alias.output].index as usize] = false;
                    }
                    AliasKind::Accumulate => {}
                }
            }
        }
        for &value in &graph.outputs {
            let root = classes.find(value);
            classes.last[root] = FOREVER;
        }
        Ok(classes)
    }

    fn find(&self, value: Value) -> usize {
        self.root(value.index as usize)
    }

    fn root(&self, mut root: usize) -> usize {
        while self.parent[root] != root {
            root = self.parent[root];
        }
        root
    }

    fn last(&self, value: Value) -> usize {
        self.last[self.find(value)]
    }

    fn is_fixed(&self, value: Value) -> bool {
        self.fixed[self.find(value)].is_some()
    }

    /// `output` lives where `input` lives.
    fn join(&mut self, input: Value, output: Value) {
        let (into, from) = (self.find(input), self.find(output));
        if into != from {
            self.parent[from] = into;
            self.last[into] = self.last[into].max(self.last[from]);
        }
    }
}

/// What blocks are sorted by before they are placed.
type Order<'a> = &'a dyn Fn(&Block) -> (Reverse<u64>, u64);

/// Buffers for blocks: of several orders in which to place them, what comes out smallest. The largest first is mostly best; where
/// sizes are alike, long lives first leave fewer gaps.
fn assign(blocks: &[Block]) -> (Vec<u64>, Vec<usize>) {
    let largest = |block: &Block| (Reverse(block.bytes), block.first as u64);
    let span = |block: &Block| (block.last.min(blocks.len()).saturating_sub(block.first)) as u64;
    let longest = |block: &Block| (Reverse(span(block)), block.first as u64);
    let weightiest = |block: &Block| {
        let weight = block.bytes.saturating_mul(span(block) + 1);
        (Reverse(weight), block.first as u64)
    };
    let last_first = |block: &Block| (Reverse(block.last as u64), block.first as u64);
    // Within a power of 2 of sizes, the longest first.
    let classes = |block: &Block| {
        let class = u64::from(block.bytes.max(1).ilog2());
        (Reverse(class), u64::MAX - span(block))
    };
    let earliest = |block: &Block| (Reverse(u64::MAX - block.first as u64), block.bytes);
    let orders: [Order<'_>; 6] = [
        &largest,
        &longest,
        &weightiest,
        &last_first,
        &classes,
        &earliest,
    ];
    let total = |placed: &(Vec<u64>, Vec<usize>)| placed.0.iter().sum::<u64>();
    orders
        .iter()
        .map(|order| {
            let mut indices: Vec<usize> = (0..blocks.len()).collect();
            indices.sort_by_key(|&index| order(&blocks[index]));
            assign_in_order(blocks, &indices)
        })
        .min_by_key(total)
        .unwrap_or_default()
}

/// Each block into the buffer, free throughout its life, that needs to grow least and of those is the smallest.
fn assign_in_order(blocks: &[Block], order: &[usize]) -> (Vec<u64>, Vec<usize>) {
    let mut pool: Vec<(u64, Vec<usize>)> = Vec::new();
    let mut pool_of_block = vec![0; blocks.len()];
    for &index in order {
        let block = &blocks[index];
        let free = |residents: &[usize]| {
            residents
                .iter()
                .all(|&other| blocks[other].last < block.first || block.last < blocks[other].first)
        };
        let best = (0..pool.len())
            .filter(|&slot| free(&pool[slot].1))
            .min_by_key(|&slot| (block.bytes.saturating_sub(pool[slot].0), pool[slot].0));
        let slot = best.unwrap_or_else(|| {
            pool.push((0, Vec::new()));
            pool.len() - 1
        });
        pool[slot].0 = pool[slot].0.max(block.bytes);
        pool[slot].1.push(index);
        pool_of_block[index] = slot;
    }
    (
        pool.into_iter().map(|(bytes, _)| bytes).collect(),
        pool_of_block,
    )
}

fn lower_bound(blocks: &[Block], steps: usize) -> u64 {
    (0..steps)
        .map(|time| {
            blocks
                .iter()
                .filter(|block| block.first <= time && time <= block.last)
                .map(|block| block.bytes)
                .sum()
        })
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_alive_together_never_share_a_buffer() {
        let spans = [
            (4, 0, 2),
            (8, 1, 3),
            (4, 3, 5),
            (16, 4, 4),
            (8, 5, FOREVER),
            (4, 6, 7),
            (2, 0, 7),
        ];
        let blocks: Vec<Block> = spans
            .iter()
            .map(|&(bytes, first, last)| Block { bytes, first, last })
            .collect();
        let (pool, places) = assign(&blocks);
        for (a, x) in blocks.iter().enumerate() {
            assert!(
                pool[places[a]] >= x.bytes,
                "block {a} does not fit its buffer"
            );
            for (b, y) in blocks.iter().enumerate().skip(a + 1) {
                let together = x.first <= y.last && y.first <= x.last;
                assert!(
                    !(together && places[a] == places[b]),
                    "blocks {a} and {b} overlap in time and space"
                );
            }
        }
        assert_eq!(lower_bound(&blocks, 8), 22, "at step 4: 4 + 16 + 2");
    }
}
