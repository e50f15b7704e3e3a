//! A case: inputs, and a function that builds a small graph from them. Each is run in the middle of a larger graph, with
//! upstream gradients that are not 1.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rankmix::{
    DType, Device, Graph, ParameterStore, Precision, Result, Session, Tensor, TensorType, Value,
};

/// Appends the operations under test and returns their results.
pub type Build = Box<dyn Fn(&mut Graph, &[Value]) -> Result<Vec<Value>> + Send + Sync>;

/// A small graph on concrete inputs.
pub struct Case {
    pub name: String,
    pub inputs: Vec<Tensor>,
    pub build: Build,
    /// Whether gradients of the float results with respect to the float inputs exist and are checked.
    pub differentiable: bool,
}

/// The operations under test in the middle of a graph.
pub struct Harness {
    pub session: Session,
    inputs: Vec<Value>,
    /// The loss, or a constant for a case without gradients.
    pub loss: Value,
    pub outputs: Vec<Value>,
    pub gradients: Vec<Value>,
}

struct Built {
    graph: Graph,
    inputs: Vec<Value>,
    loss: Value,
    outputs: Vec<Value>,
    gradients: Vec<Value>,
}

impl Case {
    pub fn new(
        name: impl Into<String>,
        inputs: Vec<Tensor>,
        build: impl Fn(&mut Graph, &[Value]) -> Result<Vec<Value>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            inputs,
            build: Box::new(build),
            differentiable: true,
        }
    }

    /// A case whose results have no gradients to check (integers, or a backward operation).
    pub fn forward_only(mut self) -> Self {
        self.differentiable = false;
        self
    }

    /// loss = sum over results of <result * result + 0.7 result, random weights>, so that every element has its own upstream
    /// gradient, and the float inputs pass through a * 1.25 - 0.125 before they reach the operations under test.
    pub fn compile(&self, device: &Device) -> Result<Harness> {
        self.compile_stored(device, Precision::F32)
    }

    /// [`Case::compile`] with values stored as `precision` says.
    pub fn compile_stored(&self, device: &Device, precision: Precision) -> Result<Harness> {
        let Built {
            graph,
            inputs,
            loss,
            outputs,
            gradients,
        } = self.build(precision)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 7)?;
        let mut session = graph.compile(&store)?;
        for (value, tensor) in inputs.iter().zip(&self.inputs) {
            session.write(*value, tensor)?;
        }
        session.poison()?;
        Ok(Harness {
            session,
            inputs,
            loss,
            outputs,
            gradients,
        })
    }

    /// The graph that [`Case::compile_stored`] compiles.
    pub fn graph(&self, precision: Precision) -> Result<Graph> {
        Ok(self.build(precision)?.graph)
    }

    fn build(&self, precision: Precision) -> Result<Built> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let mut inputs = Vec::new();
        let mut fed = Vec::new();
        for (index, tensor) in self.inputs.iter().enumerate() {
            let ty = match tensor.dtype() {
                DType::I32 => TensorType::i32(tensor.shape()),
                _ => TensorType::f32(tensor.shape()),
            };
            let value = graph.input(&format!("input{index}"), ty)?;
            inputs.push(value);
            fed.push(match tensor.dtype() {
                DType::I32 => value,
                _ => graph.affine(value, 1.25, -0.125)?,
            });
        }
        let outputs = (self.build)(&mut graph, &fed)?;
        let mut loss = graph.constant(Tensor::scalar(0.25))?;
        let mut gradients = Vec::new();
        if self.differentiable {
            for (index, &output) in outputs.iter().enumerate() {
                let ty = graph.ty(output)?.clone();
                if ty.dtype == DType::I32 {
                    continue;
                }
                let weights = graph.constant(floats(ty.dims(), 1000 + index as u64))?;
                let square = graph.square(output)?;
                let part = graph.scale(output, 0.7)?;
                let both = graph.add(square, part)?;
                let weighted = graph.mul(both, weights)?;
                let sum = graph.sum_all(weighted)?;
                loss = graph.add(loss, sum)?;
            }
            let wanted: Vec<Value> = inputs
                .iter()
                .zip(&self.inputs)
                .filter(|(_, t)| t.dtype() != DType::I32)
                .map(|(&v, _)| v)
                .collect();
            gradients = graph.gradients(loss, &wanted)?;
        }
        for &value in outputs.iter().chain(&gradients).chain([&loss]) {
            graph.output(value)?;
        }
        Ok(Built {
            graph,
            inputs,
            loss,
            outputs,
            gradients,
        })
    }
}

impl Harness {
    /// Runs and returns the results, then the gradients; noise, if there is any, is the same in every run.
    pub fn run(&mut self) -> Result<Vec<Tensor>> {
        self.session.set_random(11, 3)?;
        let values: Vec<Value> = self
            .outputs
            .iter()
            .chain(&self.gradients)
            .copied()
            .collect();
        self.session.run_reading(&values)
    }

    /// The loss with one input replaced.
    pub fn loss_with(&mut self, input: usize, tensor: &Tensor) -> Result<f64> {
        self.session.set_random(11, 3)?;
        self.session.write(self.inputs[input], tensor)?;
        let loss = self.session.run_reading(&[self.loss])?;
        Ok(loss[0].item().unwrap_or(f64::NAN))
    }
}

/// Floats in -1..1.
pub fn floats(dims: &[usize], seed: u64) -> Tensor {
    floats_in(dims, seed, -1.0, 1.0)
}

/// Floats in a range.
pub fn floats_in(dims: &[usize], seed: u64, low: f64, high: f64) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let count = dims.iter().product();
    let data = (0..count)
        .map(|_| low + (high - low) * f64::from(generator.next_u32()) / f64::from(u32::MAX));
    // Rounded to f32 first, so that every device sees the same numbers.
    Tensor::f64(dims, data.map(|x| f64::from(x as f32)).collect())
        .expect("as many elements as the shape says")
}

/// Integers in 0..limit.
pub fn ints(dims: &[usize], seed: u64, limit: u32) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let count = dims.iter().product();
    let data = (0..count).map(|_| (generator.next_u32() % limit) as i32);
    Tensor::i32(dims, data.collect()).expect("as many elements as the shape says")
}
