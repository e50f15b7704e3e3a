//! Gradient accumulation: micro-batches add up to the whole batch, the sums are cleared by the step that uses them, and a checkpoint
//! in the middle of a step is as good as any.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
use rankmix::ops::IGNORED_LABEL;
use rankmix::train::{AccumulatedUpdate, AdamW, GradientAccumulation, Optimizer};
use rankmix::{Device, Graph, ParameterStore, Result, Session, Tensor, TensorType, Value};

use crate::case::{floats, floats_in, ints};
use crate::devices;
use crate::metrics::relative_errors;

const MICRO_BATCHES: usize = 3;
const TOKENS: usize = 13;
const WIDTH: usize = 20;
const CLASSES: usize = 12;
const RATE: f64 = 1e-2;

/// A trained layer and a RotMoLE layer under a cross-entropy. No balance loss: it is no mean over tokens, so that micro-batches
/// do not add up to it.
fn model(tokens: usize) -> Result<(Graph, Value)> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([tokens, WIDTH]))?;
    let labels = graph.input("labels", TensorType::i32([tokens]))?;
    let hidden = Linear::new("hidden", WIDTH, WIDTH)
        .trained()
        .forward(&mut graph, x)?;
    let active = graph.silu(hidden)?;
    let layer = RotMole::new(
        Linear::new("layer", WIDTH, CLASSES),
        AdapterOptions::new(6, 12.0),
        Routing::new(5, 2),
    )?;
    let logits = layer.forward(&mut graph, active)?.output;
    let loss = graph.cross_entropy(logits, labels)?;
    graph.output(loss)?;
    Ok((graph, loss))
}

/// So tight that it clips every step.
fn adamw() -> AdamW {
    AdamW {
        max_norm: Some(0.05),
        ..AdamW::default()
    }
}

fn start(device: &Device, graph: &Graph) -> Result<ParameterStore> {
    let store = ParameterStore::new(device);
    store.initialize(graph, 3)?;
    // B and the rotation gate start at zero: away from there every parameter has a gradient.
    store.insert("layer.lora_b", &floats(&[5, CLASSES, 6], 500))?;
    store.insert(
        "layer.rotation_gate",
        &floats_in(&[5, 3, WIDTH], 501, -0.3, 0.3),
    )?;
    Ok(store)
}

/// The micro-batches of a step: inputs, and labels of which as many are ignored in each.
fn data(step: usize, micro_batch: usize) -> (Tensor, Tensor) {
    let seed = 510 + 20 * step as u64 + 2 * micro_batch as u64;
    let mut labels: Vec<i32> = (0..TOKENS)
        .map(|token| ((token * 7 + step * 5 + micro_batch) % CLASSES) as i32)
        .collect();
    labels[micro_batch] = IGNORED_LABEL;
    labels[micro_batch + 5] = IGNORED_LABEL;
    (
        floats(&[TOKENS, WIDTH], seed),
        Tensor::i32([TOKENS], labels).expect("as many labels as tokens"),
    )
}

/// Training by micro-batches.
struct Accumulating {
    store: ParameterStore,
    session: Session,
    update: AccumulatedUpdate,
    loss: Value,
    runs: usize,
}

impl Accumulating {
    fn new(device: &Device) -> Result<Self> {
        let (mut graph, loss) = model(TOKENS)?;
        let gradients = graph.backward(loss)?;
        let accumulated =
            GradientAccumulation::new(MICRO_BATCHES)?.add_to(&mut graph, &gradients)?;
        let store = start(device, &graph)?;
        let mut session = graph.compile(&store)?;
        session.poison()?;
        let mut update = accumulated.compile(&adamw(), &store)?;
        update.session.poison()?;
        Ok(Self {
            store,
            session,
            update,
            loss,
            runs: 0,
        })
    }

    /// One micro-batch, and the step if it was the last; returns the loss and whether it was.
    fn run(&mut self) -> Result<(f64, bool)> {
        let (x, labels) = data(self.runs / MICRO_BATCHES, self.runs % MICRO_BATCHES);
        self.session.set("x", &x)?;
        self.session.set("labels", &labels)?;
        let loss = self.session.run_reading(&[self.loss])?[0].item();
        self.runs += 1;
        let stepped = self.update.micro_batch_done(RATE)?;
        Ok((loss.unwrap_or(f64::NAN), stepped))
    }

    fn state(&self) -> Result<Vec<Tensor>> {
        let names = self.store.names();
        names.iter().map(|name| self.store.read(name)).collect()
    }

    /// The sums of the gradients.
    fn sums(&self) -> Result<Vec<Tensor>> {
        let names = self.store.names();
        names
            .iter()
            .filter(|name| name.starts_with("accumulated."))
            .map(|name| self.store.read(name))
            .collect()
    }
}

/// Training on the whole batch of a step.
struct Whole {
    store: ParameterStore,
    session: Session,
    optimizer: Optimizer,
    loss: Value,
}

impl Whole {
    fn new(device: &Device) -> Result<Self> {
        let (mut graph, loss) = model(MICRO_BATCHES * TOKENS)?;
        let gradients = graph.backward(loss)?;
        let optimizer = adamw().add_to(&mut graph, &gradients)?;
        let store = start(device, &graph)?;
        Ok(Self {
            session: graph.compile(&store)?,
            store,
            optimizer,
            loss,
        })
    }

    /// A step; returns the loss and the norm of the gradients.
    fn run(&mut self, step: usize) -> Result<(f64, f64)> {
        let (mut x, mut labels) = (Vec::new(), Vec::new());
        for micro_batch in 0..MICRO_BATCHES {
            let (x_part, labels_part) = data(step, micro_batch);
            x.extend(x_part.to_f64());
            labels.extend(labels_part.to_f64().into_iter().map(|label| label as i32));
        }
        let tokens = MICRO_BATCHES * TOKENS;
        self.session.set("x", &Tensor::f64([tokens, WIDTH], x)?)?;
        self.session
            .set("labels", &Tensor::i32([tokens], labels)?)?;
        self.optimizer.prepare(&mut self.session, RATE)?;
        let read: Vec<Value> = [self.loss].into_iter().chain(self.optimizer.norm).collect();
        let found = self.session.run_reading(&read)?;
        Ok((found[0].item().unwrap_or(f64::NAN), found[1].to_f64()[0]))
    }
}

/// Five steps of three micro-batches against five steps of their tokens together: losses, norms, parameters and moments.
fn micro_batches_are_the_whole_batch(device: &Device, tolerance: f64) -> Result<(), Failed> {
    let (mut parts, mut whole) = (Accumulating::new(device)?, Whole::new(device)?);
    let norm_value = parts.update.optimizer.norm.ok_or("clipping gives a norm")?;
    for step in 0..5 {
        let (want, want_norm) = whole.run(step)?;
        if want_norm < 0.1 {
            return Err(format!("the norm is {want_norm}: nothing is clipped").into());
        }
        let mut loss = 0.0;
        for micro_batch in 0..MICRO_BATCHES {
            let (part, stepped) = parts.run()?;
            loss += part / MICRO_BATCHES as f64;
            if stepped != (micro_batch + 1 == MICRO_BATCHES) {
                return Err(format!("micro-batch {micro_batch}: stepped is {stepped}").into());
            }
        }
        let norm = parts.update.session.read(norm_value)?.to_f64()[0];
        for (what, got, want) in [("loss", loss, want), ("norm", norm, want_norm)] {
            let error = (got - want).abs() / want;
            if error.is_nan() || error > tolerance {
                return Err(format!("step {step}: the {what} is {got}, expected {want}").into());
            }
        }
    }
    for name in whole.store.names() {
        let (got, want) = (parts.store.read(&name)?, whole.store.read(&name)?);
        let (error, _) = relative_errors(&got.to_f64(), &want.to_f64());
        // The second moments are squares.
        let allowed = if name.starts_with("adamw.") {
            10.0 * tolerance
        } else {
            tolerance
        };
        if error > allowed {
            return Err(format!("`{name}`: relative error {error:.2e} after five steps").into());
        }
    }
    Ok(())
}

/// Two trainings are equal bit for bit; the sums are zero after a step and only then.
fn reruns_are_equal_and_sums_are_cleared(device: &Device) -> Result<(), Failed> {
    let train = || -> Result<(Vec<f64>, Vec<Tensor>), Failed> {
        let mut parts = Accumulating::new(device)?;
        let mut losses = Vec::new();
        for _ in 0..3 * MICRO_BATCHES + 1 {
            let (loss, stepped) = parts.run()?;
            losses.push(loss);
            for sum in parts.sums()? {
                let zero = sum.to_f64().iter().all(|x| x.to_bits() == 0);
                if zero != stepped {
                    return Err(format!("stepped: {stepped}, and the sums are {sum:?}").into());
                }
            }
        }
        Ok((losses, parts.state()?))
    };
    if train()? == train()? {
        Ok(())
    } else {
        Err("two trainings are not equal bit for bit".into())
    }
}

fn a_checkpoint_between_micro_batches_resumes(device: &Device) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("checkpoint.safetensors");
    let mut whole = Accumulating::new(device)?;
    for _ in 0..MICRO_BATCHES + 2 {
        whole.run()?;
    }
    whole
        .store
        .save(&path, std::collections::BTreeMap::new(), |_| true)?;
    let mut resumed = Accumulating::new(device)?;
    resumed.store.load(&path)?;
    resumed.update.resume_at(
        whole.update.optimizer.steps(),
        whole.update.micro_batches_done(),
    )?;
    resumed.runs = whole.runs;
    for _ in 0..MICRO_BATCHES + 1 {
        let (a, b) = (whole.run()?, resumed.run()?);
        if a != b {
            return Err(format!("the whole training gives {a:?}, the resumed one {b:?}").into());
        }
    }
    if whole.state()? == resumed.state()? {
        Ok(())
    } else {
        Err("the parameters differ after resuming".into())
    }
}

/// A micro-batch that is discarded leaves no trace, nor does a call that fails.
fn discarded_micro_batches_leave_no_trace(device: &Device) -> Result<(), Failed> {
    let (mut plain, mut other) = (Accumulating::new(device)?, Accumulating::new(device)?);
    other.run()?;
    other.run()?;
    other.update.discard(&other.store)?;
    other.runs = 0;
    for _ in 0..MICRO_BATCHES - 1 {
        plain.run()?;
        other.run()?;
    }
    let (x, labels) = data(0, MICRO_BATCHES - 1);
    other.session.set("x", &x)?;
    other.session.set("labels", &labels)?;
    other.session.run()?;
    if other.update.micro_batch_done(f64::NAN).is_ok() {
        return Err("a learning rate of NaN was accepted".into());
    }
    let stepped = other.update.micro_batch_done(RATE)?;
    plain.run()?;
    if stepped && plain.state()? == other.state()? {
        Ok(())
    } else {
        Err("the parameters differ".into())
    }
}

/// Each micro-batch and each update is one submission, and after the first of each nothing is allocated.
fn nothing_is_allocated_after_the_first_step(device: &Device) -> Result<(), Failed> {
    let mut parts = Accumulating::new(device)?;
    // The update adds no memory but the norm's partial sums: no copy of any gradient.
    let pool = parts.update.session.memory().pool;
    if pool > 4096 {
        return Err(format!("the update's pool has {pool} bytes").into());
    }
    if device.adapter().is_none() {
        // The CPU executor submits nothing that could be counted.
        return Ok(());
    }
    for _ in 0..MICRO_BATCHES {
        parts.run()?;
    }
    let before = device.counters();
    for _ in 0..MICRO_BATCHES {
        parts.run()?;
    }
    let after = device.counters();
    let runs = MICRO_BATCHES as u64 + 1;
    let launches =
        MICRO_BATCHES * parts.session.launches().len() + parts.update.session.launches().len();
    let grown = [
        ("buffers", after.buffers - before.buffers, 0),
        ("pipelines", after.pipelines - before.pipelines, 0),
        ("bind groups", after.bind_groups - before.bind_groups, 0),
        ("passes", after.passes - before.passes, runs),
        ("submits", after.submits - before.submits, runs),
        (
            "launches",
            after.launches - before.launches,
            launches as u64,
        ),
    ];
    for (what, got, allowed) in grown {
        if got != allowed {
            return Err(format!("a step made {got} {what}, expected {allowed}").into());
        }
    }
    Ok(())
}

/// Micro-batches of two shapes share the sums: each graph adds its share.
fn graphs_of_two_shapes_share_the_sums(device: &Device) -> Result<(), Failed> {
    let sums_after = |tokens_of_runs: &[usize]| -> Result<Vec<f64>> {
        let store = start(device, &model(TOKENS)?.0)?;
        for &tokens in tokens_of_runs {
            let (mut graph, loss) = model(tokens)?;
            let gradients = graph.backward(loss)?;
            GradientAccumulation::new(2)?.add_to(&mut graph, &gradients)?;
            store.initialize(&graph, 0)?;
            let mut session = graph.compile(&store)?;
            session.set("x", &floats(&[tokens, WIDTH], 590 + tokens as u64))?;
            session.set("labels", &ints(&[tokens], 591, CLASSES as u32))?;
            session.run()?;
        }
        let mut sums = Vec::new();
        for name in ["hidden.weight", "layer.router", "layer.lora_a"] {
            sums.extend(store.read(&format!("accumulated.{name}"))?.to_f64());
        }
        Ok(sums)
    };
    let (first, second) = (sums_after(&[TOKENS])?, sums_after(&[7])?);
    let want: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
    let (error, _) = relative_errors(&sums_after(&[TOKENS, 7])?, &want);
    if error > 1e-6 {
        return Err(format!("relative error {error:.2e}").into());
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let name = "accumulation::micro_batches_are_the_whole_batch";
    let mut trials = devices::trials(name, |device| {
        micro_batches_are_the_whole_batch(device, 1e-5)
    });
    trials.push(Trial::test(format!("{name}::reference"), || {
        micro_batches_are_the_whole_batch(&Device::reference(), 1e-6)
    }));
    trials.extend(devices::trials(
        "accumulation::reruns_are_equal_and_sums_are_cleared",
        reruns_are_equal_and_sums_are_cleared,
    ));
    trials.extend(devices::trials(
        "accumulation::a_checkpoint_between_micro_batches_resumes",
        a_checkpoint_between_micro_batches_resumes,
    ));
    trials.extend(devices::trials(
        "accumulation::discarded_micro_batches_leave_no_trace",
        discarded_micro_batches_leave_no_trace,
    ));
    trials.extend(devices::trials(
        "accumulation::graphs_of_two_shapes_share_the_sums",
        graphs_of_two_shapes_share_the_sums,
    ));
    trials.extend(devices::own_trials(
        "accumulation::allocates_once",
        nothing_is_allocated_after_the_first_step,
    ));
    trials
}
