//! One run: an adapter trained and evaluated, with a progress bar.

use std::time::Instant;

use indicatif::ProgressBar;
use rankmix::train::Schedule;
use rankmix::{Device, ParameterStore, Result, Tensor};

use crate::model::Adapter;
use crate::text::Language;
use crate::training::{HeldOutGraph, Judgement, Shares, StepGraph, TOKENS, bits};

/// The weights of a trained base, on the host.
pub type Weights = Vec<(String, Tensor)>;

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
        let step = StepGraph::new(&self.adapter)?;
        let parameters = step.graph.trainable_elements();
        let names: Vec<String> = step
            .graph
            .parameters()
            .iter()
            .map(|spec| spec.name.clone())
            .filter(|name| !name.starts_with("adamw."))
            .collect();
        store.initialize(&step.graph, self.seed)?;
        let session = step.graph.compile(&store)?;
        let steps = self.steps as u64;
        let schedule = Schedule::Cosine {
            warmup: steps / 20,
            steps,
        };
        let mut training = step.in_session(session, schedule, self.seed);
        let mut losses = Vec::with_capacity(self.steps);
        let start = Instant::now();
        for _ in 0..steps {
            training.prepare_step(self.train_on)?;
            // One submission: forward, backward, clipping, AdamW, and the copy of the loss.
            let loss = training.session.run_reading(&[training.loss])?.remove(0);
            losses.push(bits(&loss));
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
        let weights = names
            .into_iter()
            .map(|name| store.read(&name).map(|tensor| (name, tensor)))
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
        let held_out = HeldOutGraph::new(&self.adapter)?;
        let mut session = held_out.graph.compile(store)?;
        let layers = held_out.model.routed.len();
        let mut judgement = Judgement::new(&self.adapter, layers, self.evaluate_on.len());
        for (language, text) in self.evaluate_on.iter().enumerate() {
            for (batch, bytes) in text.held_out(TOKENS)? {
                held_out.write(&mut session, &batch)?;
                let results = session.run_reading(&held_out.outputs)?;
                judgement.add(language, bytes, &results);
            }
        }
        Ok(judgement.finish())
    }
}
