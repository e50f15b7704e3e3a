//! Gradient accumulation: one optimiser step for several micro-batches, each of which is a run of its own.

use crate::error::{Error, Result};
use crate::graph::{
    Gradients, Graph, Init, ParameterSpec, ParameterStore, Precision, Session, SessionOptions,
};
use crate::ops::LossScaling;
use crate::tensor::Tensor;
use crate::train::{AdamW, Optimizer};

/// What the names of the summed gradients start with in the store.
const PREFIX: &str = "accumulated.";

/// How many micro-batches make one step. The step's gradient is the mean of theirs, so that micro-batches with equally many labels
/// equal one batch of all their tokens.
///
/// ```
/// # use rankmix::layers::Linear;
/// # use rankmix::train::{AdamW, GradientAccumulation};
/// # use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType};
/// # fn main() -> rankmix::Result<()> {
/// # let mut graph = Graph::new();
/// # let x = graph.input("x", TensorType::f32([4, 3]))?;
/// # let labels = graph.input("labels", TensorType::i32([4]))?;
/// # let logits = Linear::new("layer", 3, 2).trained().forward(&mut graph, x)?;
/// # let loss = graph.cross_entropy(logits, labels)?;
/// let gradients = graph.backward(loss)?;
/// let accumulated = GradientAccumulation::new(8)?.add_to(&mut graph, &gradients)?;
/// # let store = ParameterStore::new(&Device::cpu());
/// store.initialize(&graph, 42)?;
/// let mut micro_batch = graph.compile(&store)?;
/// let mut update = accumulated.compile(&AdamW::default(), &store)?;
/// for _ in 0..16 {
///     // ... write the next micro-batch ...
/// #   micro_batch.set("x", &Tensor::f32([4, 3], vec![0.5; 12])?)?;
/// #   micro_batch.set("labels", &Tensor::i32([4], vec![0, 1, 0, 1])?)?;
///     micro_batch.run()?;
///     update.micro_batch_done(1e-3)?;
/// }
/// assert_eq!(update.optimizer.steps(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GradientAccumulation {
    micro_batches: usize,
}

impl GradientAccumulation {
    /// So many micro-batches a step.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are none.
    pub fn new(micro_batches: usize) -> Result<Self> {
        if micro_batches == 0 {
            return Err(Error::setting(
                "micro_batches",
                micro_batches,
                "a step needs at least 1",
            ));
        }
        Ok(Self { micro_batches })
    }

    /// Makes a run of the graph add its gradients, over the number of micro-batches, to parameters of the store named `accumulated.NAME`. They
    /// start at zero and are saved with the store. Graphs for micro-batches of other shapes may share them.
    ///
    /// Scaling here rather than in the update spares the update a scaled copy of every gradient.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are no gradients or one is not a parameter's, [`Error::Shape`] if the graph accumulates already.
    pub fn add_to(&self, graph: &mut Graph, gradients: &Gradients) -> Result<Accumulated> {
        let mut parameters = Vec::with_capacity(gradients.pairs().len());
        for (spec, _, gradient) in gradients.trained(graph)? {
            let shape = spec.ty.shape.clone();
            let name = format!("{PREFIX}{}", spec.name);
            let sum = graph.in_f32(|graph| graph.parameter(&name, &shape, Init::Zeros, false))?;
            let gradient = graph.reshape(gradient, &shape)?;
            graph.accumulate_into(sum, gradient, 1.0 / self.micro_batches as f64)?;
            parameters.push(spec);
        }
        Ok(Accumulated {
            micro_batches: self.micro_batches,
            parameters,
            scaling: gradients.scaling,
        })
    }
}

/// Gradients that a graph accumulates: what the step that uses them is built from.
#[derive(Clone, Debug)]
pub struct Accumulated {
    micro_batches: usize,
    parameters: Vec<ParameterSpec>,
    /// How the losses were scaled, if they were. The scale moves with a step, not with a micro-batch.
    scaling: Option<LossScaling>,
}

impl Accumulated {
    /// The graph of the step: AdamW, clipping included, on the accumulated gradients, which it then sets to zero. Of the parameters that
    /// it trains it expects that the store has them.
    ///
    /// For applications that run it themselves, exactly once after every so many micro-batches; [`Accumulated::compile`] counts them.
    ///
    /// # Errors
    /// As [`AdamW::add_to`].
    pub fn update_graph(&self, adamw: &AdamW) -> Result<(Graph, Optimizer)> {
        let mut graph = Graph::new();
        let mut pairs = Vec::with_capacity(self.parameters.len());
        for spec in &self.parameters {
            let shape = &spec.ty.shape;
            graph.set_precision(Precision {
                parameters: spec.storage,
                ..Precision::F32
            });
            let parameter = graph.parameter(&spec.name, shape, Init::Provided, true)?;
            let name = format!("{PREFIX}{}", spec.name);
            let sum = graph.in_f32(|graph| graph.parameter(&name, shape, Init::Zeros, false))?;
            pairs.push((parameter, sum));
        }
        let mut gradients = Gradients::from_pairs(pairs);
        gradients.scaling = self.scaling;
        let optimizer = adamw.add_to(&mut graph, &gradients)?;
        for &(_, sum) in gradients.pairs() {
            graph.clear(sum)?;
        }
        Ok((graph, optimizer))
    }

    /// Compiles the step for a store that has the parameters, and creates the moments in it.
    ///
    /// # Errors
    /// As [`Accumulated::update_graph`], [`ParameterStore::initialize`] and [`Graph::compile`]; [`Error::UnknownName`] if the store lacks a
    /// parameter to train: it is initialised for the graph of the micro-batches first.
    pub fn compile(&self, adamw: &AdamW, store: &ParameterStore) -> Result<AccumulatedUpdate> {
        let (graph, optimizer) = self.update_graph(adamw)?;
        // All that is missing starts at zero: the seed decides nothing.
        store.initialize(&graph, 0)?;
        Ok(self.update(graph.compile(store)?, optimizer))
    }

    /// [`Accumulated::compile`] for an async caller.
    ///
    /// # Errors
    /// As [`Accumulated::compile`].
    pub async fn compile_async(
        &self,
        adamw: &AdamW,
        store: &ParameterStore,
    ) -> Result<AccumulatedUpdate> {
        let (graph, optimizer) = self.update_graph(adamw)?;
        store.initialize_async(&graph, 0).await?;
        let session = graph
            .compile_async(store, SessionOptions::default())
            .await?;
        Ok(self.update(session, optimizer))
    }

    fn update(&self, session: Session, optimizer: Optimizer) -> AccumulatedUpdate {
        AccumulatedUpdate {
            session,
            optimizer,
            micro_batches: self.micro_batches,
            done: 0,
            sums: self
                .parameters
                .iter()
                .map(|spec| format!("{PREFIX}{}", spec.name))
                .collect(),
        }
    }
}

/// The step that follows every so many micro-batches: a session of its own, one submission.
#[derive(Debug)]
pub struct AccumulatedUpdate {
    /// The session of the step.
    pub session: Session,
    /// Its AdamW; [`Optimizer::norm`] is an output of `session`.
    pub optimizer: Optimizer,
    micro_batches: usize,
    done: usize,
    sums: Vec<String>,
}

impl AccumulatedUpdate {
    /// Counts a run of the micro-batches' session, and after the last of a step runs the update with this learning rate. Returns whether
    /// it did. To be called after every such run, once.
    ///
    /// # Errors
    /// As [`Optimizer::prepare`] and [`Session::run`]; the micro-batch is then not counted. After an error of `prepare` (a rate that makes no
    /// sense) the call can be made again; after [`Error::NotFinite`] of checked mode, or with the device lost, part of the step may have
    /// happened.
    pub fn micro_batch_done(&mut self, learning_rate: f64) -> Result<bool> {
        if !self.is_due() {
            return Ok(false);
        }
        self.optimizer.prepare(&mut self.session, learning_rate)?;
        let outcome = self.session.run();
        self.stepped(outcome)
    }

    /// [`AccumulatedUpdate::micro_batch_done`] for an async caller.
    ///
    /// # Errors
    /// As [`AccumulatedUpdate::micro_batch_done`], and in a browser those of earlier calls that could not report them; then too the call can be
    /// made again.
    pub async fn micro_batch_done_async(&mut self, learning_rate: f64) -> Result<bool> {
        if !self.is_due() {
            return Ok(false);
        }
        // An error of an earlier call must not be taken for one of the step, which would then be made twice.
        self.session.device().settle().await?;
        self.optimizer.prepare(&mut self.session, learning_rate)?;
        let outcome = self.session.run_async().await;
        self.stepped(outcome)
    }

    /// Whether the micro-batch that is done completes a step; if not, it is counted.
    fn is_due(&mut self) -> bool {
        let due = self.done + 1 >= self.micro_batches;
        if !due {
            self.done += 1;
        }
        due
    }

    fn stepped(&mut self, outcome: Result<()>) -> Result<bool> {
        if let Err(error) = outcome {
            // The step did not happen.
            self.optimizer.resume_at(self.optimizer.steps() - 1);
            return Err(error);
        }
        self.done = 0;
        Ok(true)
    }

    /// Micro-batches counted since the last step.
    #[must_use]
    pub fn micro_batches_done(&self) -> usize {
        self.done
    }

    /// Goes on from a step and so many micro-batches after it, after the store was loaded from a file.
    ///
    /// # Errors
    /// [`Error::Setting`] if so many micro-batches would have been a step.
    pub fn resume_at(&mut self, step: u64, micro_batches_done: usize) -> Result<()> {
        if micro_batches_done >= self.micro_batches {
            return Err(Error::setting(
                "micro_batches_done",
                micro_batches_done,
                format!("{} make a step", self.micro_batches),
            ));
        }
        self.optimizer.resume_at(step);
        self.done = micro_batches_done;
        Ok(())
    }

    /// Forgets the micro-batches since the last step: their gradients in the store become zero.
    ///
    /// # Errors
    /// What writing to the store returns.
    pub fn discard(&mut self, store: &ParameterStore) -> Result<()> {
        for name in &self.sums {
            if let Some(ty) = store.ty(name) {
                store.insert(name, &Tensor::zeros(&ty))?;
            }
        }
        self.done = 0;
        Ok(())
    }
}
