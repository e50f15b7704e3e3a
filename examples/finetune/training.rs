//! Training and evaluating one adapter, a step and a batch at a time. Whoever runs the sessions waits for them in its own way:
//! a program blocks, a web page awaits.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rankmix::train::{AdamW, Optimizer, Schedule};
use rankmix::{Graph, Result, Session, Tensor, Value};

use crate::model::{Adapter, Model, build};
use crate::text::{Batch, Language, sample};

/// Tokens in a step.
pub const TOKENS: usize = 256;
const LEARNING_RATE: f64 = 3e-3;

/// How much of each language's gates each expert of each layer has: `[layer][expert][language]`.
pub type Shares = Vec<Vec<Vec<f64>>>;

/// A mean loss in bits per byte.
pub fn bits(loss: &Tensor) -> f64 {
    loss.item().unwrap_or(f64::NAN) * std::f64::consts::LOG2_E
}

/// The graph of a step: forward, backward, clipping, AdamW.
pub struct StepGraph {
    pub graph: Graph,
    model: Model,
    optimizer: Optimizer,
}

impl StepGraph {
    pub fn new(adapter: &Adapter) -> Result<Self> {
        let mut graph = Graph::new();
        let model = build(&mut graph, adapter, TOKENS)?;
        let gradients = graph.backward(model.training_loss)?;
        let adamw = AdamW {
            max_norm: Some(1.0),
            ..AdamW::default()
        };
        let optimizer = adamw.add_to(&mut graph, &gradients)?;
        graph.output(model.loss)?;
        Ok(Self {
            graph,
            model,
            optimizer,
        })
    }

    /// A training from its first step, in a session of the graph. The seed decides which text each step sees.
    pub fn in_session(self, session: Session, schedule: Schedule, seed: u64) -> Training {
        Training {
            session,
            loss: self.model.loss,
            model: self.model,
            optimizer: self.optimizer,
            schedule,
            generator: ChaCha8Rng::seed_from_u64(seed),
        }
    }
}

/// A training under way.
pub struct Training {
    pub session: Session,
    /// The mean loss of a step, an output of the session.
    pub loss: Value,
    model: Model,
    optimizer: Optimizer,
    schedule: Schedule,
    generator: ChaCha8Rng,
}

impl Training {
    /// Writes the text and the learning rate of the next step, which is to be run once then.
    pub fn prepare_step(&mut self, languages: &[&Language]) -> Result<()> {
        let batch = sample(languages, TOKENS, &mut self.generator)?;
        self.session.write(self.model.ids, &batch.ids)?;
        self.session.write(self.model.labels, &batch.labels)?;
        let rate = LEARNING_RATE * self.schedule.factor(self.optimizer.steps());
        self.optimizer.prepare(&mut self.session, rate)
    }
}

/// The graph of a batch of held-out text.
pub struct HeldOutGraph {
    pub graph: Graph,
    pub model: Model,
    /// What a batch is judged by: the loss, then the experts and the gates of each routed layer.
    pub outputs: Vec<Value>,
}

impl HeldOutGraph {
    pub fn new(adapter: &Adapter) -> Result<Self> {
        let mut graph = Graph::new();
        let model = build(&mut graph, adapter, TOKENS)?;
        let mut outputs = vec![model.loss];
        for layer in &model.routed {
            outputs.extend([layer.routed.experts(), layer.routed.gates]);
        }
        for &value in &outputs {
            graph.output(value)?;
        }
        Ok(Self {
            graph,
            model,
            outputs,
        })
    }

    /// Writes a batch, to be run once then.
    pub fn write(&self, session: &mut Session, batch: &Batch) -> Result<()> {
        session.write(self.model.ids, &batch.ids)?;
        session.write(self.model.labels, &batch.labels)
    }
}

/// What is known of a model from the held-out text seen so far.
pub struct Judgement {
    /// Bits, not yet per byte, by language.
    bits: Vec<f64>,
    bytes: Vec<usize>,
    gates: Shares,
}

impl Judgement {
    pub fn new(adapter: &Adapter, layers: usize, languages: usize) -> Self {
        let experts = adapter.experts().unwrap_or(0);
        Self {
            bits: vec![0.0; languages],
            bytes: vec![0; languages],
            gates: vec![vec![vec![0.0; languages]; experts]; layers],
        }
    }

    /// Takes a batch's [`HeldOutGraph::outputs`] into account, of which so many bytes were text.
    pub fn add(&mut self, language: usize, bytes: usize, results: &[Tensor]) {
        self.bits[language] += bits(&results[0]) * bytes as f64;
        self.bytes[language] += bytes;
        for (layer, pair) in self.gates.iter_mut().zip(results[1..].chunks(2)) {
            let slots = pair[0].shape().last();
            let chosen = pair[0].as_i32().unwrap_or_default();
            for (&expert, gate) in chosen.iter().zip(pair[1].to_f64()).take(bytes * slots) {
                layer[expert as usize][language] += gate;
            }
        }
    }

    /// Bits per byte by language, and the experts' shares.
    pub fn finish(self) -> (Vec<f64>, Shares) {
        let mut shares = self.gates;
        for expert in shares.iter_mut().flatten() {
            for (share, &bytes) in expert.iter_mut().zip(&self.bytes) {
                *share /= bytes as f64;
            }
        }
        let per_byte = self.bits.iter().zip(&self.bytes);
        let bits = per_byte.map(|(bits, &bytes)| bits / bytes as f64).collect();
        (bits, shares)
    }
}
