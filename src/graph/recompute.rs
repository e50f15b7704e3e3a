//! Recomputation of activations: the values inside a segment of the graph die at the end of the forward pass, and the backward
//! pass computes them again from the segment's inputs when it comes to it (Chen et al., arXiv 1604.06174).

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, Source, Value, ValueInfo};
use crate::ops::{AliasKind, Op};
use crate::tensor::Tensor;

/// The segments of a graph, and which of its values are copies of others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recomputation {
    /// The nodes of each segment. Two segments are disjoint, or one holds the other.
    segments: Vec<Range<usize>>,
    /// How many segments are being built.
    open: usize,
    /// The value that each recomputed one equals, bit for bit.
    originals: HashMap<Value, Value>,
}

/// What one backward pass has recomputed so far.
#[derive(Debug, Default)]
pub(crate) struct Recomputed {
    done: HashSet<usize>,
    /// The newest copy of each value.
    copies: HashMap<Value, Value>,
}

impl Recomputed {
    /// What gradient rules see in place of these values.
    pub(crate) fn in_place_of(&self, values: &[Value]) -> Vec<Value> {
        values
            .iter()
            .map(|value| self.copies.get(value).copied().unwrap_or(*value))
            .collect()
    }
}

impl Graph {
    /// Builds a segment of the graph, a layer say, whose values [`Graph::backward`] computes again rather than keeps: between the
    /// forward pass and the backward pass only what goes in and what comes out stays in memory. Results and gradients are equal bit for
    /// bit; the price is a second forward pass through the segment. [`MemoryReport`](super::MemoryReport) says what it saves.
    ///
    /// A value that something outside uses by the time of the backward pass, or that is an output of the graph, is kept and not computed
    /// again. Segments may hold segments: the inner one's values are then dropped once more while the outer one is recomputed.
    ///
    /// ```
    /// # use rankmix::layers::{AdapterOptions, Linear, MoeLora, Routing};
    /// # use rankmix::{Graph, TensorType};
    /// # fn main() -> rankmix::Result<()> {
    /// # let mut graph = Graph::new();
    /// # let x = graph.input("x", TensorType::f32([8, 16]))?;
    /// let layer = MoeLora::new(Linear::new("up", 16, 32), AdapterOptions::new(4, 8.0), Routing::new(4, 2))?;
    /// let hidden = graph.recompute(|graph| {
    ///     let up = layer.forward(graph, x)?;
    ///     graph.silu(up.output)
    /// })?;
    /// # graph.output(hidden)
    /// # }
    /// ```
    ///
    /// Parameters that the segment reads are updated (a selection bias, say) after [`Graph::backward`], not before: the segment reads them
    /// again.
    ///
    /// # Errors
    /// What `build` returns; [`Error::Shape`] if it updates a parameter: an update cannot be done twice.
    pub fn recompute<T>(&mut self, build: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let first = self.nodes.len();
        self.recomputation.open += 1;
        let built = build(self);
        self.recomputation.open -= 1;
        let built = built?;
        if first < self.nodes.len() {
            self.recomputation.segments.push(first..self.nodes.len());
        }
        Ok(built)
    }

    /// Refuses an operation that must not run twice where a segment is being built.
    pub(crate) fn check_recomputable(&self, op: &dyn Op) -> Result<()> {
        let updates = |op: &dyn Op| {
            op.aliases()
                .iter()
                .any(|alias| alias.kind == AliasKind::Update)
        };
        if self.recomputation.open > 0 && updates(op) {
            return Err(Error::shape(
                op.name(),
                "updates a parameter inside a recomputed segment, which would do it twice",
            ));
        }
        Ok(())
    }

    /// The value that a recomputed one equals; any other value itself.
    pub(crate) fn original(&self, value: Value) -> Value {
        self.recomputation
            .originals
            .get(&value)
            .copied()
            .unwrap_or(value)
    }

    /// Appends the nodes of the segments that hold `node` once more, outermost first, if this backward pass has not yet. Nodes from
    /// `count` on are its own.
    pub(crate) fn recompute_segments_of(
        &mut self,
        node: usize,
        count: usize,
        recomputed: &mut Recomputed,
    ) -> Result<()> {
        let mut around: Vec<usize> = (0..self.recomputation.segments.len())
            .filter(|&segment| self.recomputation.segments[segment].contains(&node))
            .collect();
        around
            .sort_by_key(|&segment| std::cmp::Reverse(self.recomputation.segments[segment].len()));
        for segment in around {
            if recomputed.done.insert(segment) {
                let nodes = self.recomputation.segments[segment].clone();
                self.recompute_nodes(nodes, count, &mut recomputed.copies)?;
            }
        }
        Ok(())
    }

    fn recompute_nodes(
        &mut self,
        nodes: Range<usize>,
        count: usize,
        copies: &mut HashMap<Value, Value>,
    ) -> Result<()> {
        let used_outside: HashSet<Value> = (0..nodes.start)
            .chain(nodes.end..count)
            .flat_map(|node| &self.nodes[node].inputs)
            .chain(&self.outputs)
            .copied()
            .collect();
        for index in nodes {
            let Node {
                op,
                inputs,
                outputs,
            } = self.nodes[index].clone();
            let inputs: Vec<Value> = inputs
                .iter()
                .map(|value| copies.get(value).copied().unwrap_or(*value))
                .collect();
            // The same operation on the same elements: what nobody needs of it, the planner drops.
            let again = self.append(Arc::clone(&op), &inputs)?;
            for (&output, copy) in outputs.iter().zip(again) {
                self.values[copy.index as usize].storage =
                    self.values[output.index as usize].storage;
                self.recomputation.originals.insert(copy, output);
                if !used_outside.contains(&output) {
                    copies.insert(output, copy);
                }
            }
        }
        Ok(())
    }

    /// The graph as it would be had nothing been recomputed, for the planner alone: without the elements of constants. `None` if
    /// nothing is.
    pub(crate) fn without_recomputation(&self) -> Option<Self> {
        if self.recomputation.originals.is_empty() {
            return None;
        }
        let originals =
            |values: &[Value]| values.iter().map(|&value| self.original(value)).collect();
        Some(Self {
            id: self.id,
            nodes: self
                .nodes
                .iter()
                .map(|node| Node {
                    op: Arc::clone(&node.op),
                    inputs: originals(&node.inputs),
                    outputs: node.outputs.clone(),
                })
                .collect(),
            values: self
                .values
                .iter()
                .map(|info| ValueInfo {
                    ty: info.ty.clone(),
                    storage: info.storage,
                    source: match &info.source {
                        Source::Constant(_) => Source::Constant(Tensor::scalar(0.0)),
                        other => other.clone(),
                    },
                })
                .collect(),
            parameters: self.parameters.clone(),
            outputs: originals(&self.outputs),
            names: self.names.clone(),
            updated: self.updated.clone(),
            products: HashMap::new(),
            gated: HashMap::new(),
            recomputation: Recomputation::default(),
            precision: self.precision,
            training: self.training,
            noises: self.noises,
        })
    }
}
