//! Reverse-mode differentiation: one walk over the operations, newest first, each of which builds its gradient by hand.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::graph::recompute::Recomputed;
use crate::graph::{Graph, ParameterSpec, Source, Storage, Value};
use crate::ops::LossScaling;
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// The gradients of the trainable parameters, by parameter.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    pub(crate) pairs: Vec<(Value, Value)>,
    /// How the loss was scaled, if it was: the gradients are as many times too large.
    pub(crate) scaling: Option<LossScaling>,
}

impl Gradients {
    /// Gradients that come from elsewhere than [`Graph::backward`]: pairs of (parameter, gradient), both of one graph.
    #[must_use]
    pub fn from_pairs(pairs: Vec<(Value, Value)>) -> Self {
        Self {
            pairs,
            scaling: None,
        }
    }

    /// Each parameter's declaration, the parameter and its gradient: what can be trained.
    pub(crate) fn trained(&self, graph: &Graph) -> Result<Vec<(ParameterSpec, Value, Value)>> {
        if self.pairs.is_empty() {
            return Err(Error::setting(
                "gradients",
                "none",
                "no trainable parameter reaches the loss",
            ));
        }
        let trained = |&(parameter, gradient): &(Value, Value)| {
            graph.ty(parameter)?;
            graph.ty(gradient)?;
            match graph.values[parameter.index as usize].source {
                Source::Parameter(index) => {
                    Ok((graph.parameters[index].clone(), parameter, gradient))
                }
                _ => Err(Error::setting(
                    "gradients",
                    graph.describe(parameter),
                    "only parameters can be trained",
                )),
            }
        };
        self.pairs.iter().map(trained).collect()
    }

    /// The gradient of a value, if it has one.
    #[must_use]
    pub fn of(&self, value: Value) -> Option<Value> {
        self.pairs
            .iter()
            .find(|(of, _)| *of == value)
            .map(|&(_, gradient)| gradient)
    }

    /// Pairs of (parameter, gradient), in the order of the parameters' declaration.
    #[must_use]
    pub fn pairs(&self) -> &[(Value, Value)] {
        &self.pairs
    }
}

/// What an operation sees while its gradient is built.
#[derive(Debug)]
pub struct Backward<'a> {
    /// The graph, to which gradient operations are appended.
    pub graph: &'a mut Graph,
    inputs: Vec<Value>,
    outputs: Vec<Value>,
    output_gradients: Vec<Option<Value>>,
    wanted: Vec<bool>,
    partial: &'a mut HashMap<Value, Value>,
}

impl Backward<'_> {
    /// The operation's input of this number.
    #[must_use]
    pub fn input(&self, index: usize) -> Value {
        self.inputs[index]
    }

    /// The operation's output of this number.
    #[must_use]
    pub fn output(&self, index: usize) -> Value {
        self.outputs[index]
    }

    /// The gradient of an output; `None` if nothing that follows depends on it.
    #[must_use]
    pub fn gradient(&self, output: usize) -> Option<Value> {
        self.output_gradients[output]
    }

    /// Whether the gradient of this input is needed.
    #[must_use]
    pub fn wants(&self, input: usize) -> bool {
        self.wanted[input]
    }

    /// Adds `gradient` to the gradient of an input.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not have the input's shape.
    pub fn add(&mut self, input: usize, gradient: Value) -> Result<()> {
        self.accumulate(input, |graph, sum| match sum {
            Some(sum) => graph.accumulate(sum, gradient),
            None => Ok(gradient),
        })
    }

    /// Takes `new`, an equal gradient, for `old` wherever `old` is all of a gradient so far: what nobody reads then is not computed.
    pub(crate) fn replace(&mut self, old: Value, new: Value) {
        let storage = self.graph.values[old.index as usize].storage;
        for sum in self.partial.values_mut().filter(|sum| **sum == old) {
            *sum = new;
            self.graph.values[new.index as usize].storage = storage;
        }
    }

    /// Replaces the gradient of an input, as summed so far, by one that `build` makes from it: for operations that can add into
    /// memory that is already there.
    ///
    /// # Errors
    /// What `build` returns; [`Error::Shape`] if the new gradient does not have the input's shape.
    pub fn accumulate(
        &mut self,
        input: usize,
        build: impl FnOnce(&mut Graph, Option<Value>) -> Result<Value>,
    ) -> Result<()> {
        let of = self.graph.original(self.inputs[input]);
        let sum = build(self.graph, self.partial.get(&of).copied())?;
        let (expected, found) = (self.graph.ty(of)?, self.graph.ty(sum)?);
        if expected.elements() != found.elements() {
            return Err(Error::shape(
                "backward",
                format!(
                    "{} is {expected}, its gradient {found}",
                    self.graph.describe(of)
                ),
            ));
        }
        // Gradients of parameters and of what is kept in f32 are kept in f32 too.
        let given = &self.graph.values[of.index as usize];
        let exact = given.storage == Storage::F32 || matches!(given.source, Source::Parameter(_));
        if exact && self.graph.is_computed(sum) {
            self.graph.values[sum.index as usize].storage = Storage::F32;
        }
        self.partial.insert(of, sum);
        Ok(())
    }
}

impl Graph {
    /// The gradients of a scalar with respect to every trainable parameter it depends on.
    ///
    /// # Errors
    /// [`Error::Shape`] if `loss` has more than one element, [`Error::NoGradient`] if an operation on the way has no rule.
    pub fn backward(&mut self, loss: Value) -> Result<Gradients> {
        let seed = self.seed(loss)?;
        self.backward_from(loss, seed, None)
    }

    pub(crate) fn backward_from(
        &mut self,
        loss: Value,
        seed: Value,
        scaling: Option<LossScaling>,
    ) -> Result<Gradients> {
        let wanted = self.trainable();
        let gradients = self.walk(&[(loss, seed)], &wanted)?;
        let pairs = wanted
            .into_iter()
            .zip(gradients)
            .filter_map(|(value, gradient)| Some((value, gradient?)))
            .collect();
        Ok(Gradients { pairs, scaling })
    }

    /// The gradients of a scalar with respect to the values named, frozen parameters and inputs included.
    ///
    /// # Errors
    /// As [`Graph::backward`], and [`Error::NoPath`] if the scalar does not depend on one of them.
    pub fn gradients(&mut self, loss: Value, wanted: &[Value]) -> Result<Vec<Value>> {
        let seed = self.seed(loss)?;
        self.gradients_from(&[(loss, seed)], wanted)
    }

    /// The gradients of `sum over (value, upstream) of <value, upstream>`: for a part of a larger computation whose upstream
    /// gradients come from elsewhere. Each `upstream` has its value's shape.
    ///
    /// # Errors
    /// As [`Graph::gradients`].
    pub fn gradients_from(
        &mut self,
        upstream: &[(Value, Value)],
        wanted: &[Value],
    ) -> Result<Vec<Value>> {
        let gradients = self.walk(upstream, wanted)?;
        wanted
            .iter()
            .zip(gradients)
            .map(|(&value, gradient)| {
                gradient.ok_or_else(|| Error::NoPath {
                    value: self.describe(value),
                })
            })
            .collect()
    }

    fn seed(&mut self, loss: Value) -> Result<Value> {
        let ty = self.loss_type(loss)?;
        self.constant(Tensor::new(ty.shape, TensorData::F32(vec![1.0]))?)
    }

    /// The type of a loss: one float.
    pub(crate) fn loss_type(&self, loss: Value) -> Result<TensorType> {
        let ty = self.ty(loss)?;
        if ty.elements() == 1 && ty.dtype == DType::F32 {
            return Ok(ty.clone());
        }
        Err(Error::shape(
            "backward",
            format!("the loss is {ty}, expected one float"),
        ))
    }

    fn walk(
        &mut self,
        upstream: &[(Value, Value)],
        wanted: &[Value],
    ) -> Result<Vec<Option<Value>>> {
        for &value in wanted {
            self.ty(value)?;
        }
        // Which values a wanted one flows into.
        let mut flows = vec![false; self.values.len()];
        for value in wanted {
            flows[value.index as usize] = true;
        }
        let count = self.nodes.len();
        for node in &self.nodes {
            let carries = node.inputs.iter().enumerate().any(|(input, value)| {
                flows[self.original(*value).index as usize] && node.op.differentiable(input)
            });
            for output in &node.outputs {
                let float = self.values[output.index as usize].ty.dtype == DType::F32;
                flows[output.index as usize] |= carries && float;
            }
        }
        let mut partial: HashMap<Value, Value> = HashMap::new();
        for &(value, gradient) in upstream {
            let (expected, found) = (self.ty(value)?, self.ty(gradient)?);
            if expected != found || *expected != TensorType::f32(&expected.shape) {
                return Err(Error::shape(
                    "backward",
                    format!("a value of {expected} was given a gradient of {found}"),
                ));
            }
            let sum = match partial.get(&value) {
                Some(&sum) => self.accumulate(sum, gradient)?,
                None => gradient,
            };
            partial.insert(value, sum);
        }
        let mut recomputed = Recomputed::default();
        for index in (0..count).rev() {
            let node = self.nodes[index].clone();
            let output_gradients: Vec<_> = node
                .outputs
                .iter()
                .map(|output| partial.get(output).copied())
                .collect();
            if output_gradients.iter().all(Option::is_none) {
                continue;
            }
            let wanted: Vec<bool> = node
                .inputs
                .iter()
                .enumerate()
                .map(|(input, value)| {
                    flows[self.original(*value).index as usize] && node.op.differentiable(input)
                })
                .collect();
            if !wanted.contains(&true) {
                continue;
            }
            self.recompute_segments_of(index, count, &mut recomputed)?;
            let mut context = Backward {
                graph: self,
                inputs: recomputed.in_place_of(&node.inputs),
                outputs: recomputed.in_place_of(&node.outputs),
                output_gradients,
                wanted,
                partial: &mut partial,
            };
            node.op.backward(&mut context)?;
        }
        Ok(wanted
            .iter()
            .map(|value| partial.get(value).copied())
            .collect())
    }

    /// Whether a value is computed by an operation (rather than given from outside).
    pub(crate) fn is_computed(&self, value: Value) -> bool {
        matches!(
            self.values[value.index as usize].source,
            Source::Node { .. }
        )
    }
}
