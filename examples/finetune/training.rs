//! Training and evaluating one adapter.

use std::time::Instant;

use indicatif::ProgressBar;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rankmix::train::{AdamW, Schedule};
use rankmix::{Device, Graph, ParameterStore, Result, Tensor};

use crate::model::{Adapter, build};
use crate::text::{Language, sample};

/// Tokens in a step.
pub const TOKENS: usize = 256;
const LEARNING_RATE: f64 = 3e-3;
const BITS_PER_NAT: f64 = std::f64::consts::LOG2_E;

/// The weights of a trained base, on the host.
pub type Weights = Vec<(String, Tensor)>;

/// How much of each language's gates each expert of each layer has: `[layer][expert][language]`.
pub type Shares = Vec<Vec<Vec<f64>>>;

/// What came of one run.
pub struct Outcome {
    pub parameters: usize,
    /// Training loss in bits per byte, step by step.
    pub losses: Vec<f64>,
    /// Held-out bits per byte, by language.
    pub bits: Vec<f64>,
    pub shares: Shares,
    pub seconds: f64,
    pub weights: Weights,
}

/// One run: which adapter on which weights, from which seed.
pub struct Run<'a> {
    pub device: &'a Device,
    pub adapter: Adapter,
    pub base: &'a [(String, Tensor)],
    pub train_on: &'a [&'a Language],
    pub evaluate_on: &'a [Language],
    pub steps: usize,
    pub seed: u64,
}

impl Run<'_> {
    pub fn go(&self, bar: &ProgressBar) -> Result<Outcome> {
        let store = ParameterStore::new(self.device);
        for (name, tensor) in self.base {
            store.insert(name, tensor)?;
        }
        let mut graph = Graph::new();
        let model = build(&mut graph, &self.adapter, TOKENS)?;
        let parameters = graph.trainable_elements();
        let gradients = graph.backward(model.training_loss)?;
        let mut optimizer = AdamW {
            max_norm: Some(1.0),
            ..AdamW::default()
        }
        .add_to(&mut graph, &gradients)?;
        graph.output(model.loss)?;
        store.initialize(&graph, self.seed)?;
        let mut session = graph.compile(&store)?;

        let steps = self.steps as u64;
        let schedule = Schedule::Cosine {
            warmup: steps / 20,
            steps,
        };
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        let mut losses = Vec::with_capacity(self.steps);
        let start = Instant::now();
        for step in 0..steps {
            let batch = sample(self.train_on, TOKENS, &mut generator)?;
            session.write(model.ids, &batch.ids)?;
            session.write(model.labels, &batch.labels)?;
            optimizer.prepare(&mut session, LEARNING_RATE * schedule.factor(step))?;
            // One submission: forward, backward, clipping, AdamW, and the copy of the loss.
            let loss = session.run_reading(&[model.loss])?[0]
                .item()
                .unwrap_or(f64::NAN);
            losses.push(loss * BITS_PER_NAT);
            bar.inc(1);
            let recent = &losses[losses.len().saturating_sub(20)..];
            let speed = (losses.len() * TOKENS) as f64 / start.elapsed().as_secs_f64();
            let mean = recent.iter().sum::<f64>() / recent.len() as f64;
            bar.set_message(format!(
                "{} loss {mean:.3} bits/byte, {speed:.0} tokens/s",
                self.adapter.name()
            ));
        }
        let seconds = start.elapsed().as_secs_f64();
        let (bits, shares) = self.evaluate(&store)?;
        let weights = graph
            .parameters()
            .iter()
            .filter(|spec| !spec.name.starts_with("adamw."))
            .map(|spec| Ok((spec.name.clone(), store.read(&spec.name)?)))
            .collect::<Result<Weights>>()?;
        Ok(Outcome {
            parameters,
            losses,
            bits,
            shares,
            seconds,
            weights,
        })
    }

    /// Held-out bits per byte by language, and how the experts share them.
    fn evaluate(&self, store: &ParameterStore) -> Result<(Vec<f64>, Shares)> {
        let mut graph = Graph::new();
        let model = build(&mut graph, &self.adapter, TOKENS)?;
        let mut outputs = vec![model.loss];
        for layer in &model.routed {
            outputs.extend([layer.routed.experts(), layer.routed.gates]);
        }
        for &value in &outputs {
            graph.output(value)?;
        }
        let mut session = graph.compile(store)?;
        let experts = self.adapter.experts().unwrap_or(0);
        let mut shares = vec![vec![vec![0.0; self.evaluate_on.len()]; experts]; model.routed.len()];
        let mut bits = Vec::new();
        for (language, text) in self.evaluate_on.iter().enumerate() {
            let (mut sum, mut count) = (0.0, 0);
            for (batch, bytes) in text.held_out(TOKENS)? {
                session.write(model.ids, &batch.ids)?;
                session.write(model.labels, &batch.labels)?;
                let results = session.run_reading(&outputs)?;
                sum += results[0].item().unwrap_or(f64::NAN) * bytes as f64;
                count += bytes;
                for (layer, pair) in results[1..].chunks(2).enumerate() {
                    let slots = pair[0].shape().last();
                    let chosen = pair[0].as_i32().unwrap_or_default();
                    for (&expert, gate) in chosen.iter().zip(pair[1].to_f64()).take(bytes * slots) {
                        shares[layer][expert as usize][language] += gate;
                    }
                }
            }
            bits.push(sum / count as f64 * BITS_PER_NAT);
            for layer in &mut shares {
                for expert in layer {
                    expert[language] /= count as f64;
                }
            }
        }
        Ok((bits, shares))
    }
}
