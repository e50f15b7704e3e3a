//! Whole training steps on every device: equal reruns, one submission, nothing allocated after the first, AdamW against PyTorch's
//! formula, saving and loading.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{AdapterOptions, GateInput, Linear, RotMole, Routing};
use rankmix::ops::Rotation;
use rankmix::train::{AdamW, Optimizer};
use rankmix::{Device, Error, Graph, ParameterStore, Result, Session, Tensor, TensorType, Value};

use crate::case::{floats, ints};
use crate::devices;

/// A RotMoLE layer under a cross-entropy, with everything a training step has.
struct Step {
    store: ParameterStore,
    session: Session,
    optimizer: Optimizer,
    loss: Value,
    parameters: Vec<String>,
}

const TOKENS: usize = 37;
const D_IN: usize = 20;
const CLASSES: usize = 12;

fn step_of(device: &Device, rotation: Rotation) -> Result<Step> {
    step_on(ParameterStore::new(device), rotation)
}

/// A step whose parameters live in a store that others may use too.
fn step_on(store: ParameterStore, rotation: Rotation) -> Result<Step> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, D_IN]))?;
    let labels = graph.input("labels", TensorType::i32([TOKENS]))?;
    let layer = RotMole::with_rotation(
        Linear::new("layer", D_IN, CLASSES),
        AdapterOptions::new(6, 12.0),
        Routing::new(5, 2),
        rotation,
        GateInput::Input,
    )?;
    let routed = layer.forward(&mut graph, x)?;
    let loss = graph.cross_entropy(routed.output, labels)?;
    let auxiliary = routed.auxiliary_loss(&mut graph, 0.01, 0.001)?;
    let total = graph.add(loss, auxiliary)?;
    graph.output(loss)?;
    let gradients = graph.backward(total)?;
    let optimizer = AdamW {
        max_norm: Some(1.0),
        ..AdamW::default()
    }
    .add_to(&mut graph, &gradients)?;
    store.initialize(&graph, 3)?;
    let mut session = graph.compile(&store)?;
    session.poison()?;
    session.set("x", &floats(&[TOKENS, D_IN], 60))?;
    session.set("labels", &ints(&[TOKENS], 61, CLASSES as u32))?;
    let parameters = graph
        .parameters()
        .iter()
        .map(|spec| spec.name.clone())
        .collect();
    Ok(Step {
        store,
        session,
        optimizer,
        loss,
        parameters,
    })
}

impl Step {
    fn run(&mut self) -> Result<f64> {
        self.optimizer.prepare(&mut self.session, 1e-2)?;
        Ok(self.session.run_reading(&[self.loss])?[0]
            .item()
            .unwrap_or(f64::NAN))
    }

    fn state(&self) -> Result<Vec<Tensor>> {
        self.parameters
            .iter()
            .map(|name| self.store.read(name))
            .collect()
    }
}

fn reruns_are_equal(device: &Device, rotation: Rotation) -> Result<(), Failed> {
    let train = || -> Result<(Vec<f64>, Vec<Tensor>)> {
        let mut step = step_of(device, rotation)?;
        let losses = (0..6).map(|_| step.run()).collect::<Result<Vec<_>>>()?;
        Ok((losses, step.state()?))
    };
    let (first, second) = (train()?, train()?);
    if first != second {
        return Err("two trainings are not equal bit for bit".into());
    }
    let (start, end) = (first.0[0], first.0[5]);
    if end.is_nan() || end >= start {
        return Err(format!("the loss went from {start} to {end}").into());
    }
    Ok(())
}

fn nothing_is_allocated_after_the_first_run(device: &Device) -> Result<(), Failed> {
    if device.adapter().is_none() {
        return Ok(());
    }
    let mut step = step_of(device, Rotation::Planes)?;
    step.run()?;
    let before = device.counters();
    step.run()?;
    let after = device.counters();
    let grown = [
        ("buffers", after.buffers - before.buffers, 0),
        ("pipelines", after.pipelines - before.pipelines, 0),
        ("bind groups", after.bind_groups - before.bind_groups, 0),
        ("passes", after.passes - before.passes, 1),
        ("submits", after.submits - before.submits, 1),
        (
            "launches",
            after.launches - before.launches,
            step.session.launches().len() as u64,
        ),
    ];
    for (what, got, allowed) in grown {
        if got != allowed {
            return Err(
                format!("a run after the first made {got} {what}, expected {allowed}").into(),
            );
        }
    }
    Ok(())
}

/// Every launch of a step can be timed where the adapter has timestamps; elsewhere that is an error.
fn launches_are_timed(device: &Device) -> Result<(), Failed> {
    let mut step = step_of(device, Rotation::Planes)?;
    step.run()?;
    let timed = step.session.profile();
    let can = device
        .adapter()
        .is_some_and(|adapter| adapter.capabilities.timestamps);
    match timed {
        Ok(timings) if can => {
            let expected: Vec<String> = step
                .session
                .launches()
                .iter()
                .map(|launch| format!("{}::{}", launch.shader.name, launch.entry))
                .collect();
            let found: Vec<String> = timings.iter().map(|timing| timing.kernel.clone()).collect();
            let seconds: f64 = timings.iter().map(|timing| timing.seconds).sum();
            if found != expected || !(seconds > 0.0 && seconds < 60.0) {
                return Err(format!("{seconds} seconds for {found:?}").into());
            }
            Ok(())
        }
        Err(_) if !can => Ok(()),
        other => Err(format!("timestamps: {can}, and yet {other:?}").into()),
    }
}

/// AdamW and clipping against the formula in f64.
fn adamw_is_pytorchs(device: &Device) -> Result<(), Failed> {
    let (rate, decay, max_norm) = (0.05, 0.1, 0.5);
    let mut graph = Graph::new();
    let w = graph.parameter("w", [3, 7], rankmix::Init::Provided, true)?;
    let target = graph.input("target", TensorType::f32([3, 7]))?;
    let difference = graph.sub(w, target)?;
    let square = graph.square(difference)?;
    let loss = graph.sum_all(square)?;
    let gradients = graph.backward(loss)?;
    let mut adamw = AdamW {
        max_norm: Some(max_norm as f32),
        ..AdamW::default()
    };
    adamw.constants.weight_decay = decay;
    let mut optimizer = adamw.add_to(&mut graph, &gradients)?;
    let store = ParameterStore::new(device);
    let start = floats(&[3, 7], 62);
    let goal = floats(&[3, 7], 63).to_f64();
    store.insert("w", &start)?;
    store.initialize(&graph, 0)?;
    let mut session = graph.compile(&store)?;
    session.write(target, &Tensor::f64([3, 7], goal.clone())?)?;

    let mut theta = start.to_f64();
    let (mut m, mut v) = (vec![0.0; 21], vec![0.0; 21]);
    for t in 1..=20 {
        optimizer.prepare(&mut session, rate)?;
        let norm_value = optimizer.norm.ok_or("clipping gives a norm")?;
        let reported = session.run_reading(&[norm_value])?[0].to_f64()[0];
        let gradient: Vec<f64> = theta
            .iter()
            .zip(&goal)
            .map(|(w, t)| 2.0 * (w - t))
            .collect();
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        if (reported - norm).abs() > 1e-5 * norm {
            return Err(format!("step {t}: the norm is {reported}, expected {norm}").into());
        }
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        for i in 0..21 {
            let g = gradient[i] * clip;
            theta[i] *= 1.0 - rate * decay;
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let corrected = m[i] / (1.0 - 0.9_f64.powi(t));
            theta[i] -= rate * corrected / ((v[i] / (1.0 - 0.999_f64.powi(t))).sqrt() + 1e-8);
        }
    }
    let (error, _) = crate::metrics::relative_errors(&store.read("w")?.to_f64(), &theta);
    if error > 1e-5 {
        Err(format!("relative error {error:.2e} after 20 steps").into())
    } else {
        Ok(())
    }
}

fn training_resumes_from_a_file(device: &Device) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("checkpoint.safetensors");
    let mut whole = step_of(device, Rotation::Planes)?;
    for _ in 0..3 {
        whole.run()?;
    }
    let metadata = [("step".to_owned(), whole.optimizer.steps().to_string())]
        .into_iter()
        .collect();
    whole.store.save(&path, metadata, |_| true)?;
    let mut resumed = step_of(device, Rotation::Planes)?;
    let metadata = resumed.store.load(&path)?;
    resumed.optimizer.resume_at(metadata["step"].parse()?);
    for _ in 0..2 {
        let (a, b) = (whole.run()?, resumed.run()?);
        if a.to_bits() != b.to_bits() {
            return Err(format!("the whole training has loss {a}, the resumed one {b}").into());
        }
    }
    if whole.state()? == resumed.state()? {
        Ok(())
    } else {
        Err("the parameters differ after resuming".into())
    }
}

/// Two sessions that take turns on one store train as one session does: parameters and moments are the store's, and only the
/// count of the steps is the optimiser's own.
fn sessions_take_turns_on_a_store(device: &Device) -> Result<(), Failed> {
    let mut alone = step_of(device, Rotation::Planes)?;
    let store = ParameterStore::new(device);
    let mut turns = [
        step_on(store.clone(), Rotation::Planes)?,
        step_on(store, Rotation::Planes)?,
    ];
    for step in 0..6 {
        let turn = &mut turns[step % 2];
        turn.optimizer.resume_at(step as u64);
        let (got, want) = (turn.run()?, alone.run()?);
        if got.to_bits() != want.to_bits() {
            return Err(format!("step {step}: the loss is {got}, alone it is {want}").into());
        }
    }
    if turns[0].state()? != alone.state()? {
        return Err("the parameters differ".into());
    }
    let [first, second] = &mut turns;
    let foreign = first.optimizer.prepare(&mut second.session, 1e-2);
    if !matches!(foreign, Err(Error::ForeignValue { .. })) || first.optimizer.steps() != 5 {
        return Err(format!("{foreign:?}, and {} steps", first.optimizer.steps()).into());
    }
    Ok(())
}

/// A session of the forward pass alone sees every step of the training at once.
fn evaluation_sees_the_training(device: &Device) -> Result<(), Failed> {
    let mut step = step_of(device, Rotation::Planes)?;
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, D_IN]))?;
    let labels = graph.input("labels", TensorType::i32([TOKENS]))?;
    let layer = RotMole::new(
        Linear::new("layer", D_IN, CLASSES),
        AdapterOptions::new(6, 12.0),
        Routing::new(5, 2),
    )?;
    let routed = layer.forward(&mut graph, x)?;
    let loss = graph.cross_entropy(routed.output, labels)?;
    graph.output(loss)?;
    let mut evaluation = graph.compile(&step.store)?;
    evaluation.write(x, &floats(&[TOKENS, D_IN], 60))?;
    evaluation.write(labels, &ints(&[TOKENS], 61, CLASSES as u32))?;
    let mut before = f64::NAN;
    for _ in 0..4 {
        let seen = evaluation.run_reading(&[loss])?[0].item();
        // A step reports the loss from before its update.
        let trained = step.run()?;
        if seen.map(f64::to_bits) != Some(trained.to_bits()) || trained == before {
            return Err(
                format!("evaluation saw {seen:?}, the step {trained} after {before}").into(),
            );
        }
        before = trained;
    }
    Ok(())
}

/// After [`Optimizer::reset`] and with the parameters put back, a training is what it was the first time.
fn a_reset_optimizer_starts_again(device: &Device) -> Result<(), Failed> {
    let mut step = step_of(device, Rotation::Planes)?;
    let start = step.state()?;
    let first = (0..3).map(|_| step.run()).collect::<Result<Vec<_>>>()?;
    let end = step.state()?;
    for (name, tensor) in step.parameters.iter().zip(&start) {
        if !name.starts_with("adamw.") {
            step.store.insert(name, tensor)?;
        }
    }
    step.optimizer.reset(&step.store)?;
    if step.state()? != start || step.optimizer.steps() != 0 {
        return Err("the moments or the step are not zero".into());
    }
    let second = (0..3).map(|_| step.run()).collect::<Result<Vec<_>>>()?;
    if first == second && step.state()? == end {
        Ok(())
    } else {
        Err(format!("the losses are {second:?}, they were {first:?}").into())
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for rotation in Rotation::ALL {
        let name = format!("training::equal_reruns_{rotation}");
        trials.extend(devices::trials(&name, move |device| {
            reruns_are_equal(device, rotation)
        }));
    }
    trials.extend(devices::trials(
        "training::adamw_and_clipping",
        adamw_is_pytorchs,
    ));
    trials.extend(devices::trials(
        "training::sessions_take_turns_on_a_store",
        sessions_take_turns_on_a_store,
    ));
    trials.extend(devices::trials(
        "training::evaluation_sees_the_training",
        evaluation_sees_the_training,
    ));
    trials.extend(devices::trials(
        "training::a_reset_optimizer_starts_again",
        a_reset_optimizer_starts_again,
    ));
    trials.extend(devices::trials(
        "training::resumes_from_a_file",
        training_resumes_from_a_file,
    ));
    trials.extend(devices::own_trials(
        "training::launches_are_timed",
        launches_are_timed,
    ));
    trials.extend(devices::own_trials(
        "training::allocates_once",
        nothing_is_allocated_after_the_first_run,
    ));
    trials
}
