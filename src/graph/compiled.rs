//! What a session keeps of the graph that it was compiled from.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::halves::storages;
use crate::graph::plan::Plan;
use crate::graph::{Graph, ParameterStore, Source, Storage, Value};
use crate::ops::{AliasKind, Op};
use crate::tensor::{DType, Tensor, TensorType};

/// What a session keeps of its graph.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) graph: u32,
    pub(crate) types: Vec<TensorType>,
    pub(crate) storages: Vec<Storage>,
    pub(crate) nodes: Vec<CompiledNode>,
    pub(crate) constants: Vec<(u32, Tensor)>,
    pub(crate) descriptions: Vec<String>,
    /// Limits of integer inputs: limit and ignored value, by input.
    pub(crate) ranges: HashMap<u32, Vec<(usize, Option<i32>)>>,
    pub(crate) inputs: HashMap<String, u32>,
    pub(crate) outputs: Vec<u32>,
}

impl Compiled {
    /// The size of a value in device memory.
    pub(crate) fn bytes(&self, value: u32) -> u64 {
        let ty = &self.types[value as usize];
        if ty.dtype == DType::I32 {
            return ty.bytes() as u64;
        }
        (ty.elements() * self.storages[value as usize].bytes()) as u64
    }
}

#[derive(Debug)]
pub(crate) struct CompiledNode {
    pub(crate) op: Arc<dyn Op>,
    pub(crate) inputs: Vec<u32>,
    pub(crate) outputs: Vec<u32>,
    pub(crate) is_view: bool,
}

impl Graph {
    /// What the values are stored in, parameters as the store has them.
    pub(crate) fn storages_in(&self, store: &ParameterStore) -> Result<Vec<Storage>> {
        let stored: Vec<Storage> = self
            .parameters
            .iter()
            .map(|spec| store.storage(&spec.name).unwrap_or(spec.storage))
            .collect();
        for (spec, &stored) in self.parameters.iter().zip(&stored) {
            // The optimiser was built for what the graph says: with a master copy or without.
            if stored != spec.storage && self.updated.contains_key(&self.names[&spec.name]) {
                return Err(Error::setting(
                    "precision",
                    format!("{:?}", spec.storage),
                    format!(
                        "the parameter `{}`, which is updated, is in the store as {stored:?}: see ParameterStore::convert",
                        spec.name
                    ),
                ));
            }
        }
        Ok(storages(self, |index| stored[index]))
    }

    pub(crate) fn compiled(&self, plan: &Plan) -> Result<Compiled> {
        let types: Vec<TensorType> = self.values.iter().map(|value| value.ty.clone()).collect();
        let mut ranges: HashMap<u32, Vec<(usize, Option<i32>)>> = HashMap::new();
        for step in &plan.steps {
            let node = &self.nodes[step.node];
            let inputs: Vec<TensorType> = node
                .inputs
                .iter()
                .map(|value| types[value.index as usize].clone())
                .collect();
            for range in node.op.index_ranges(&inputs) {
                // A view of an input (a reshape) is written through the input.
                let class = plan.classes[node.inputs[range.input].index as usize] as u32;
                ranges
                    .entry(class)
                    .or_default()
                    .push((range.limit, range.ignored));
            }
        }
        let value_at = |index: usize| Value {
            graph: self.id,
            index: index as u32,
        };
        Ok(Compiled {
            graph: self.id,
            nodes: self
                .nodes
                .iter()
                .map(|node| CompiledNode {
                    op: Arc::clone(&node.op),
                    inputs: node.inputs.iter().map(|value| value.index).collect(),
                    outputs: node.outputs.iter().map(|value| value.index).collect(),
                    is_view: node
                        .op
                        .aliases()
                        .iter()
                        .any(|alias| alias.kind == AliasKind::View),
                })
                .collect(),
            constants: plan
                .constants
                .iter()
                .filter_map(|&index| match &self.values[index as usize].source {
                    Source::Constant(tensor) => Some((index, tensor.clone())),
                    _ => None,
                })
                .collect(),
            descriptions: (0..self.values.len())
                .map(|index| self.describe(value_at(index)))
                .collect(),
            ranges,
            inputs: self
                .values
                .iter()
                .enumerate()
                .filter_map(|(index, value)| match &value.source {
                    Source::Input(name) => Some((name.clone(), index as u32)),
                    _ => None,
                })
                .collect(),
            outputs: self.outputs.iter().map(|value| value.index).collect(),
            types,
            storages: plan.storages.clone(),
        })
    }
}
