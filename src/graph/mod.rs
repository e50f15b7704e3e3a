//! The static graph: an append-only list of operations, built once, differentiated once, compiled for a device, run many times.

mod backward;
mod compiled;
mod cost;
mod gpu_executor;
mod halves;
mod host_executor;
mod launches;
mod plan;
mod precision;
mod recompute;
mod session;
mod store;
mod tune;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub use backward::{Backward, Gradients};
pub use cost::{Cost, OperationCost};
pub use plan::MemoryReport;
pub use precision::{Precision, Storage};
pub use session::{Session, SessionOptions};
pub use store::ParameterStore;
pub(crate) use store::{MASTER, rounds_to};
pub use tune::{TunedOperation, Tuning};

use crate::error::{Error, Result};
use crate::graph::recompute::Recomputation;
use crate::ops::{AliasKind, GatedGradient, Op, Product};
use crate::tensor::{DType, Shape, Tensor, TensorType};

/// A handle on a tensor of a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Value {
    graph: u32,
    pub(crate) index: u32,
}

/// How a parameter starts.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// These elements.
    Given(Tensor),
    /// As another parameter of the store, declared before: a copy in another storage.
    Copy {
        /// The other's name.
        of: String,
    },
    /// Uniform in `-bound..bound`.
    Uniform {
        /// The bound.
        bound: f32,
    },
    /// Normal with mean 0.
    Normal {
        /// The standard deviation.
        deviation: f32,
    },
    /// It must be put into the store before a session is compiled (pretrained weights, say).
    Provided,
}

/// A parameter as a graph declares it.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// The name in the store.
    pub name: String,
    /// Shape and element type.
    pub ty: TensorType,
    /// How it starts.
    pub init: Init,
    /// Whether [`Graph::backward`] computes its gradient.
    pub trainable: bool,
    /// What its elements are stored in when the store creates it.
    pub storage: Storage,
}

#[derive(Clone, Debug)]
pub(crate) enum Source {
    Input(String),
    Parameter(usize),
    Constant(Tensor),
    Node { node: usize, output: usize },
}

#[derive(Clone, Debug)]
pub(crate) struct ValueInfo {
    pub(crate) ty: TensorType,
    pub(crate) source: Source,
    pub(crate) storage: Storage,
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) op: Arc<dyn Op>,
    pub(crate) inputs: Vec<Value>,
    pub(crate) outputs: Vec<Value>,
}

/// A computation: inputs, parameters, constants, and operations on them. Shapes are checked as it is built.
#[derive(Debug)]
pub struct Graph {
    id: u32,
    pub(crate) nodes: Vec<Node>,
    pub(crate) values: Vec<ValueInfo>,
    pub(crate) parameters: Vec<ParameterSpec>,
    pub(crate) outputs: Vec<Value>,
    names: HashMap<String, Value>,
    /// The value that a parameter has after the operations that update it.
    updated: HashMap<Value, Value>,
    /// Products of two matrices, and what they were added to: see [`Graph::matmul_onto`].
    pub(crate) products: HashMap<Value, (Product, Option<Value>)>,
    /// The gradients of latents that a gated expand read, by themselves: see [`Graph::gate_gradient`].
    pub(crate) gated: HashMap<Value, GatedGradient>,
    precision: Precision,
    recomputation: Recomputation,
    training: bool,
    /// How many operations that add noise there are.
    noises: u32,
}

/// The input that holds the seed and the step of the noise operations; sessions write it themselves.
pub(crate) const RANDOM: &str = "rankmix.random";

impl Default for Graph {
    fn default() -> Self {
        Self::new()
    }
}

/// Element counts stay below this, so that kernels can index with 32 bits and host code can cast without loss.
const MAX_ELEMENTS: usize = i32::MAX as usize;

impl Graph {
    /// An empty graph.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            nodes: Vec::new(),
            values: Vec::new(),
            parameters: Vec::new(),
            outputs: Vec::new(),
            names: HashMap::new(),
            updated: HashMap::new(),
            products: HashMap::new(),
            gated: HashMap::new(),
            precision: Precision::F32,
            recomputation: Recomputation::default(),
            training: false,
            noises: 0,
        }
    }

    /// Whether layers that are added from now on behave as in training (with dropout) or as in evaluation, which is how a graph
    /// starts.
    pub fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    /// Whether layers behave as in training.
    #[must_use]
    pub fn is_training(&self) -> bool {
        self.training
    }

    /// The seed and step that noise is made from, and a number for one more operation that makes noise.
    pub(crate) fn next_noise(&mut self) -> Result<(Value, u32)> {
        let random = match self.noises {
            0 => self.input(RANDOM, TensorType::i32([2]))?,
            _ => self.named(RANDOM)?,
        };
        self.noises += 1;
        Ok((random, self.noises - 1))
    }

    fn push(
        &mut self,
        thing: &str,
        ty: TensorType,
        source: Source,
        storage: Storage,
    ) -> Result<Value> {
        if ty.dims().contains(&0) {
            return Err(Error::setting(
                "shape",
                &ty.shape,
                format!("{thing}: every extent must be at least 1"),
            ));
        }
        if ty.dtype == DType::F64 {
            return Err(Error::setting(
                "dtype",
                "f64",
                format!("{thing}: floats on a graph are f32"),
            ));
        }
        let elements = ty
            .dims()
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent));
        if elements.is_none_or(|count| count > MAX_ELEMENTS) {
            return Err(Error::Limit {
                thing: thing.to_owned(),
                needed: elements.unwrap_or(usize::MAX) as u64,
                limit: MAX_ELEMENTS as u64,
                unit: "elements in one tensor",
            });
        }
        let value = Value {
            graph: self.id,
            index: self.values.len() as u32,
        };
        self.values.push(ValueInfo {
            ty,
            source,
            storage,
        });
        Ok(value)
    }

    /// A tensor that the host writes before a run, by this name.
    ///
    /// # Errors
    /// [`Error::DuplicateName`] if another input or parameter has the name, [`Error::Limit`] if it is too large.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<Value> {
        if self.names.contains_key(name) {
            return Err(Error::DuplicateName {
                name: name.to_owned(),
                reason: "inputs need names of their own".to_owned(),
            });
        }
        let value = self.push(name, ty, Source::Input(name.to_owned()), Storage::F32)?;
        self.names.insert(name.to_owned(), value);
        Ok(value)
    }

    /// A tensor that lives in a [`ParameterStore`] by this name. Declaring it twice gives the same value, so that layers can
    /// share parameters; it is trainable if any declaration says so, and stored in 32 bits if any does.
    ///
    /// # Errors
    /// [`Error::DuplicateName`] if an input has the name, or the parameter was declared with another shape.
    pub fn parameter(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        init: Init,
        trainable: bool,
    ) -> Result<Value> {
        let ty = TensorType::f32(shape);
        if let Some(&value) = self.names.get(name) {
            let info = &self.values[value.index as usize];
            return match info.source {
                Source::Parameter(index) if info.ty == ty => {
                    self.parameters[index].trainable |= trainable;
                    // One declaration that needs f32 is enough.
                    if self.precision.parameters == Storage::F32 {
                        self.parameters[index].storage = Storage::F32;
                        self.values[value.index as usize].storage = Storage::F32;
                    }
                    Ok(value)
                }
                _ => Err(Error::DuplicateName {
                    name: name.to_owned(),
                    reason: format!("declared as {} before, as {ty} now", info.ty),
                }),
            };
        }
        let storage = self.precision.parameters;
        let source = Source::Parameter(self.parameters.len());
        let value = self.push(name, ty.clone(), source, storage)?;
        self.parameters.push(ParameterSpec {
            name: name.to_owned(),
            ty,
            init,
            trainable,
            storage,
        });
        self.names.insert(name.to_owned(), value);
        Ok(value)
    }

    /// A tensor that never changes.
    ///
    /// # Errors
    /// [`Error::Limit`] if it is too large.
    pub fn constant(&mut self, tensor: Tensor) -> Result<Value> {
        let ty = match tensor.dtype() {
            DType::F64 => TensorType::f32(tensor.shape()),
            _ => tensor.ty(),
        };
        self.push("constant", ty, Source::Constant(tensor), Storage::F32)
    }

    /// Appends an operation; how every method of the graph that computes something works, and the way in for operations of an
    /// application's own.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operands do not fit, [`Error::ForeignValue`] if one is of another graph, [`Error::Limit`] if a
    /// result is too large.
    pub fn apply(&mut self, op: impl Op, inputs: &[Value]) -> Result<Vec<Value>> {
        self.append(Arc::new(op), inputs)
    }

    fn append(&mut self, op: Arc<dyn Op>, inputs: &[Value]) -> Result<Vec<Value>> {
        self.check_recomputable(&*op)?;
        let types = inputs
            .iter()
            .map(|&value| self.checked_type(op.name(), value))
            .collect::<Result<Vec<_>>>()?;
        let output_types = op.outputs(&types)?;
        let node = self.nodes.len();
        let outputs = output_types
            .into_iter()
            .enumerate()
            .map(|(output, ty)| {
                let storage = self.storage_of_output(&*op, inputs, output, &ty);
                self.push(op.name(), ty, Source::Node { node, output }, storage)
            })
            .collect::<Result<Vec<_>>>()?;
        for alias in op
            .aliases()
            .iter()
            .filter(|alias| alias.kind == AliasKind::Update)
        {
            let root = self.update_root(inputs[alias.input]).ok_or_else(|| {
                Error::shape(
                    op.name(),
                    format!(
                        "{} cannot be updated: only parameters can",
                        self.describe(inputs[alias.input])
                    ),
                )
            })?;
            self.updated.insert(root, outputs[alias.output]);
        }
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
        });
        Ok(outputs)
    }

    /// What a result is stored in: as the operand whose memory it takes over, or else as the graph's precision says, where the
    /// operation can do with 16 bits.
    fn storage_of_output(
        &self,
        op: &dyn Op,
        inputs: &[Value],
        output: usize,
        ty: &TensorType,
    ) -> Storage {
        let aliases = op.aliases();
        let alias = aliases.iter().find(|alias| alias.output == output);
        match alias {
            _ if ty.dtype != DType::F32 => Storage::F32,
            // A sum that is made in f32 widens the values it is made in.
            Some(alias)
                if alias.kind != AliasKind::Accumulate
                    || (self.is_computed(inputs[alias.input])
                        && self.precision.activations == Storage::F16) =>
            {
                self.values[inputs[alias.input].index as usize].storage
            }
            _ if op.keeps_f32(output) => Storage::F32,
            _ => self.precision.activations,
        }
    }

    /// [`Graph::apply`] for an operation with one result.
    pub(crate) fn apply1(&mut self, op: impl Op, inputs: &[Value]) -> Result<Value> {
        let name = op.name();
        let outputs = self.apply(op, inputs)?;
        outputs
            .first()
            .copied()
            .ok_or_else(|| Error::shape(name, "has no result"))
    }

    /// The parameter whose newest state `value` is.
    fn update_root(&self, value: Value) -> Option<Value> {
        if let Source::Parameter(_) = self.values[value.index as usize].source {
            return (!self.updated.contains_key(&value)).then_some(value);
        }
        self.updated
            .iter()
            .find(|&(_, &newest)| newest == value)
            .map(|(&root, _)| root)
    }

    fn checked_type(&self, op: &'static str, value: Value) -> Result<TensorType> {
        if value.graph == self.id {
            Ok(self.values[value.index as usize].ty.clone())
        } else {
            Err(Error::ForeignValue { op })
        }
    }

    /// The shape and element type of a value.
    ///
    /// # Errors
    /// [`Error::ForeignValue`] if the value is of another graph.
    pub fn ty(&self, value: Value) -> Result<&TensorType> {
        if value.graph == self.id {
            Ok(&self.values[value.index as usize].ty)
        } else {
            Err(Error::ForeignValue { op: "ty" })
        }
    }

    /// Marks a value as one that sessions keep and the host may read.
    ///
    /// # Errors
    /// [`Error::ForeignValue`] if the value is of another graph.
    pub fn output(&mut self, value: Value) -> Result<()> {
        self.checked_type("output", value)?;
        if !self.outputs.contains(&value) {
            self.outputs.push(value);
        }
        Ok(())
    }

    /// The value of a named input or parameter.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if there is none.
    pub fn named(&self, name: &str) -> Result<Value> {
        self.names
            .get(name)
            .copied()
            .ok_or_else(|| Error::UnknownName {
                kind: "input or parameter",
                name: name.to_owned(),
            })
    }

    /// The parameters declared so far.
    #[must_use]
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.parameters
    }

    /// The values of the trainable parameters, in the order of their declaration.
    #[must_use]
    pub fn trainable(&self) -> Vec<Value> {
        self.parameters
            .iter()
            .filter(|spec| spec.trainable)
            .map(|spec| self.names[&spec.name])
            .collect()
    }

    /// How many elements the trainable parameters have together.
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.parameters
            .iter()
            .filter(|spec| spec.trainable)
            .map(|spec| spec.ty.elements())
            .sum()
    }

    /// A value's name for messages: an input's or a parameter's own, or the operation that computes it.
    pub(crate) fn describe(&self, value: Value) -> String {
        match &self.values[value.index as usize].source {
            Source::Input(name) => format!("the input `{name}`"),
            Source::Parameter(index) => format!("the parameter `{}`", self.parameters[*index].name),
            Source::Constant(_) => format!("constant {}", value.index),
            Source::Node { node, output } => {
                let node_info = &self.nodes[*node];
                let which = if node_info.outputs.len() > 1 {
                    format!(", output {output}")
                } else {
                    String::new()
                };
                format!(
                    "the result of `{}` (operation {node}{which})",
                    node_info.op.name()
                )
            }
        }
    }
}

impl fmt::Display for Graph {
    /// One line an operation: results, name, operands.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, value) in self.values.iter().enumerate() {
            match &value.source {
                Source::Input(name) => writeln!(f, "%{index} {} = input {name}", value.ty)?,
                Source::Parameter(p) => writeln!(
                    f,
                    "%{index} {} = parameter {}",
                    value.ty, self.parameters[*p].name
                )?,
                Source::Constant(_) => writeln!(f, "%{index} {} = constant", value.ty)?,
                Source::Node { node, output: 0 } => {
                    let node = &self.nodes[*node];
                    for (position, output) in node.outputs.iter().enumerate() {
                        let ty = &self.values[output.index as usize].ty;
                        write!(
                            f,
                            "{}%{} {ty}",
                            if position > 0 { ", " } else { "" },
                            output.index
                        )?;
                    }
                    write!(f, " = {}", node.op.name())?;
                    for input in &node.inputs {
                        write!(f, " %{}", input.index)?;
                    }
                    writeln!(f)?;
                }
                Source::Node { .. } => {}
            }
        }
        Ok(())
    }
}
