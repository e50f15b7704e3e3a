//! What a graph has to do at the least.

use std::iter::Sum;
use std::ops::Add;

use crate::error::Result;
use crate::graph::Graph;
use crate::graph::halves::storages;
use crate::graph::plan::live_nodes;
use crate::ops::{AliasKind, LaunchTypes, Work};
use crate::tensor::{DType, TensorType};

/// Arithmetic and memory traffic, as [`Work`] counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Operations on floats.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// What one operation of a graph costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationCost {
    /// [`Op::name`](crate::Op::name).
    pub op: &'static str,
    /// Its cost.
    pub cost: Cost,
}

impl Graph {
    /// The least that a run has to compute and to move, every operation by itself: the sum of [`Graph::operation_costs`].
    ///
    /// # Errors
    /// As [`Graph::operation_costs`].
    pub fn cost(&self) -> Result<Cost> {
        let costs = self.operation_costs()?;
        Ok(costs.into_iter().map(|operation| operation.cost).sum())
    }

    /// The least that each operation has to compute and to move, in the order of a run: those that an output or an update depends
    /// on. A result that nobody uses need not be written, and an operand given twice is read once.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if an operation does not know its own operands.
    pub fn operation_costs(&self) -> Result<Vec<OperationCost>> {
        let stored = storages(self, |index| self.parameters[index].storage);
        let live = live_nodes(self);
        let mut used = vec![false; self.values.len()];
        for &node in &live {
            let node = &self.nodes[node];
            let updated = node.op.aliases().into_iter().filter_map(|alias| {
                (alias.kind == AliasKind::Update).then_some(node.outputs[alias.output])
            });
            for value in node.inputs.iter().copied().chain(updated) {
                used[value.index as usize] = true;
            }
        }
        for value in &self.outputs {
            used[value.index as usize] = true;
        }
        let element_bytes = |index: usize| match self.values[index].ty.dtype {
            DType::F32 => stored[index].bytes() as u64,
            _ => 4,
        };
        let types = |values: &[crate::Value]| -> Vec<TensorType> {
            let types = values
                .iter()
                .map(|value| &self.values[value.index as usize]);
            types.map(|value| value.ty.clone()).collect()
        };
        live.iter()
            .map(|&node| {
                let node = &self.nodes[node];
                let (inputs, outputs) = (types(&node.inputs), types(&node.outputs));
                let io = LaunchTypes {
                    inputs: &inputs,
                    outputs: &outputs,
                };
                let Work {
                    flops,
                    reads,
                    writes,
                } = node.op.work(io)?;
                let mut read: Vec<(usize, u64)> = Vec::new();
                for (value, &elements) in node.inputs.iter().zip(&reads) {
                    let index = value.index as usize;
                    match read.iter_mut().find(|(seen, _)| *seen == index) {
                        Some((_, most)) => *most = elements.max(*most),
                        None => read.push((index, elements)),
                    }
                }
                let written = node.outputs.iter().zip(&writes);
                let written = written
                    .map(|(value, &elements)| (value.index as usize, elements))
                    .filter(|&(index, _)| used[index]);
                let moved = read.iter().copied().chain(written);
                let bytes = moved.map(|(index, elements)| elements * element_bytes(index));
                Ok(OperationCost {
                    op: node.op.name(),
                    cost: Cost {
                        flops,
                        bytes: bytes.sum(),
                    },
                })
            })
            .collect()
    }
}
