//! 16-bit storage: rounding, every operation, memory, and training with a scaled loss. On Vulkan with f16 in the kernels where the
//! adapter has it; on GL, and on a device opened without it, with packed halves.

use half::f16;
use libtest_mimic::{Failed, Trial};
use rankmix::layers::{AdapterOptions, Linear, MoeLora, Routing};
use rankmix::train::{AdamW, LossScaling, Optimizer};
use rankmix::{
    DType, Device, Graph, Init, ParameterStore, Precision, Result, Session, Storage, Tensor,
    TensorType, Value,
};

use crate::case::{Case, floats, ints};
use crate::metrics::relative_errors;
use crate::parity::agrees;
use crate::{cases, devices, host};

/// What rounding to 16 bits has to get right: ties, the ends of the range, subnormals, zeros, and what is beyond.
fn numbers() -> Vec<f32> {
    let mut numbers = vec![
        0.0,
        -0.0,
        1.0,
        -1.5,
        65_504.0,
        65_519.0,
        65_520.0,
        -65_520.0,
        1e30,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        6.103_515_6e-5,
        6e-5,
        5.960_464_5e-8,
        1e-9,
        -3e-6,
    ];
    let spread = floats(&[83], 500).to_f32();
    numbers.extend(
        spread
            .iter()
            .enumerate()
            .map(|(i, x)| x * 1.7_f32.powi(i as i32 % 25 - 12)),
    );
    numbers
}

fn halves_are_nearest(device: &Device) -> Result<(), Failed> {
    let numbers = numbers();
    let shape = [numbers.len()];
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32(shape))?;
    graph.set_precision(Precision::F16);
    let parameter = graph.parameter("p", shape, Init::Zeros, false)?;
    let parameter = graph.assign(parameter, x)?;
    let copied = graph.scale(x, 1.0)?;
    for value in [parameter, copied] {
        graph.output(value)?;
    }
    let store = ParameterStore::new(device);
    store.initialize(&graph, 0)?;
    let mut session = graph.compile(&store)?;
    session.write(x, &Tensor::f32(shape, numbers.clone())?)?;
    let found = session.run_reading(&[parameter, copied])?;
    for (what, found) in [
        ("the parameter", store.read("p")?),
        ("the updated parameter", found[0].clone()),
        ("the activation", found[1].clone()),
    ] {
        for (x, got) in numbers.iter().zip(found.to_f32()) {
            let want = f16::from_f32(*x).to_f32();
            let equal = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            // A driver may flush what is subnormal in 16 bits.
            let flushed = x.abs() < 6.2e-5 && (got - want).abs() < 6.2e-5;
            if !equal && !flushed {
                return Err(format!("{what}: {x} became {got}, the nearest is {want}").into());
            }
        }
    }
    Ok(())
}

/// An operation's results and gradients in 16 bits against the f64 reference.
fn check_case(case: &Case, device: &Device, precision: Precision) -> Result<(), Failed> {
    let want = case.compile(&Device::reference())?.run()?;
    let got = agrees(case, device, precision, &want)?;
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
        if want.dtype() == DType::I32 {
            continue;
        }
        let (norm, _) = relative_errors(&got.to_f64(), &want.to_f64());
        if want.to_f64().len() > 64 && norm == 0.0 && precision != Precision::F32 && index == 0 {
            return Err("not a digit was lost: nothing is stored in 16 bits".into());
        }
    }
    Ok(())
}

/// A mixture of adapters under a cross-entropy, trained in a given storage.
struct Training {
    store: ParameterStore,
    session: Session,
    optimizer: Optimizer,
    loss: Value,
    names: Vec<String>,
}

const TOKENS: usize = 37;
const D_IN: usize = 20;
const CLASSES: usize = 12;

impl Training {
    fn new(
        device: &Device,
        precision: Precision,
        scaling: Option<LossScaling>,
        factor: f32,
    ) -> Result<Self> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let x = graph.input("x", TensorType::f32([TOKENS, D_IN]))?;
        let labels = graph.input("labels", TensorType::i32([TOKENS]))?;
        let layer = MoeLora::new(
            Linear::new("layer", D_IN, CLASSES),
            AdapterOptions::new(6, 12.0),
            Routing::new(5, 2),
        )?;
        let routed = layer.forward(&mut graph, x)?;
        let loss = graph.cross_entropy(routed.output, labels)?;
        graph.output(loss)?;
        let scaled = graph.scale(loss, factor)?;
        let gradients = match scaling {
            Some(scaling) => graph.backward_scaled(scaled, scaling)?,
            None => graph.backward(scaled)?,
        };
        let adamw = AdamW {
            max_norm: Some(1.0),
            ..AdamW::default()
        };
        let optimizer = adamw.add_to(&mut graph, &gradients)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 3)?;
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.set("x", &floats(&[TOKENS, D_IN], 60))?;
        session.set("labels", &ints(&[TOKENS], 61, CLASSES as u32))?;
        let names = graph.parameters().iter().map(|spec| spec.name.clone());
        Ok(Self {
            store,
            session,
            optimizer,
            loss,
            names: names.collect(),
        })
    }

    /// The loss before a step, and the state of the scale after it.
    fn step(&mut self) -> Result<(f64, Vec<f32>)> {
        self.optimizer.prepare(&mut self.session, 1e-2)?;
        let read: Vec<Value> = [Some(self.loss), self.optimizer.loss_scale]
            .into_iter()
            .flatten()
            .collect();
        let results = self.session.run_reading(&read)?;
        let state = results.get(1).map(Tensor::to_f32).unwrap_or_default();
        Ok((results[0].item().unwrap_or(f64::NAN), state))
    }

    fn state(&self) -> Result<Vec<Tensor>> {
        self.names
            .iter()
            .map(|name| self.store.read(name))
            .collect()
    }
}

fn short(interval: u32) -> Option<LossScaling> {
    Some(LossScaling {
        initial: 1024.0,
        interval,
        ..LossScaling::default()
    })
}

/// In 16 bits a training follows the one in f32, reruns are equal bit for bit, and parameters are their master copies, rounded.
fn training_follows_f32(device: &Device) -> Result<(), Failed> {
    let losses = |precision, scaling| -> Result<(Vec<f64>, Vec<Tensor>)> {
        let mut training = Training::new(device, precision, scaling, 1.0)?;
        let losses = (0..12)
            .map(|_| Ok(training.step()?.0))
            .collect::<Result<Vec<_>>>()?;
        Ok((losses, training.state()?))
    };
    let wide = losses(Precision::F32, None)?.0;
    let scaled = losses(Precision::F32, short(4))?.0;
    let first = losses(Precision::F16, short(4))?;
    let second = losses(Precision::F16, short(4))?;
    if first != second {
        return Err("two trainings are not equal bit for bit".into());
    }
    for (step, ((wide, scaled), narrow)) in wide.iter().zip(&scaled).zip(&first.0).enumerate() {
        // A scale that is a power of two changes nothing in f32 but the epsilon's side of rounding.
        if (wide - scaled).abs() > 1e-5 * wide || (wide - narrow).abs() > 1e-2 * wide {
            return Err(format!(
                "step {step}: {wide} in f32, {scaled} scaled, {narrow} in 16 bits"
            )
            .into());
        }
    }
    if first.0[11] >= first.0[0] {
        return Err(format!("the loss went from {} to {}", first.0[0], first.0[11]).into());
    }
    let training = {
        let mut training = Training::new(device, Precision::F16, short(4), 1.0)?;
        training.step()?;
        training
    };
    let stored = training.store.read("layer.lora_a")?.to_f32();
    let master = training.store.read("adamw.master.layer.lora_a")?.to_f32();
    let rounded: Vec<f32> = master.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    if training.store.storage("layer.lora_a") != Some(Storage::F16)
        || training.store.storage("layer.router") != Some(Storage::F32)
        || stored != rounded
        || stored == master
    {
        return Err("the parameter is not its master copy, rounded".into());
    }
    Ok(())
}

/// New weights reach the master copy too, and a checkpoint brings back what it held: training resumes bit for bit.
fn masters_follow_what_is_loaded(device: &Device) -> Result<(), Failed> {
    let mut training = Training::new(device, Precision::F16, short(4), 1.0)?;
    for _ in 0..3 {
        training.step()?;
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("checkpoint.safetensors");
    training.store.save(&path, Default::default(), |_| true)?;
    let mut resumed = Training::new(device, Precision::F16, short(4), 1.0)?;
    resumed.store.load(&path)?;
    resumed.optimizer.resume_at(training.optimizer.steps());
    for _ in 0..3 {
        if training.step()? != resumed.step()? {
            return Err("the resumed training takes another course".into());
        }
    }
    if training.state()? != resumed.state()? {
        return Err("the resumed training ends elsewhere".into());
    }
    let name = "layer.lora_a";
    let fresh = floats(training.store.read(name)?.shape().dims(), 510);
    training.store.insert(name, &fresh)?;
    let master = training.store.read("adamw.master.layer.lora_a")?.to_f32();
    if master == fresh.to_f32() {
        Ok(())
    } else {
        Err("the optimiser would go on from the weights that were replaced".into())
    }
}

/// A step whose gradients overflow changes nothing but the scale; the scale comes down, and grows again.
fn overflow_skips_the_step(device: &Device) -> Result<(), Failed> {
    let scaling = LossScaling {
        initial: 1e30,
        backoff: 1e-6,
        growth: 2.0,
        interval: 3,
    };
    let mut training = Training::new(device, Precision::F16, Some(scaling), 1.0)?;
    let parameters = |training: &Training| -> Result<Vec<Tensor>> {
        let names = training.names.iter();
        let names = names.filter(|name| *name != "adamw.loss_scale");
        names.map(|name| training.store.read(name)).collect()
    };
    let before = parameters(&training)?;
    let mut skipped = 0.0;
    loop {
        let (_, state) = training.step()?;
        if state[3] == skipped {
            break;
        }
        skipped += 1.0;
        if state[1] != 0.0 || state[2] != 0.0 || skipped > 6.0 {
            return Err(format!("after {skipped} overflows the state is {state:?}").into());
        }
        if parameters(&training)? != before {
            return Err("a step that overflowed changed a parameter".into());
        }
    }
    if skipped < 2.0 || parameters(&training)? == before {
        return Err(format!("{skipped} steps were skipped, and none taken").into());
    }
    let (_, at_two) = training.step()?;
    let (_, at_three) = training.step()?;
    let (_, at_four) = training.step()?;
    let expected = [at_two[0], 0.0, 3.0, skipped];
    let grown = at_three[0] == 2.0 * at_two[0] && at_three[1..] == expected[1..];
    if at_two[1..] != [2.0, 2.0, skipped] || !grown || at_four[1..] != [1.0, 4.0, skipped] {
        return Err(format!("states {at_two:?}, {at_three:?}, {at_four:?}").into());
    }
    Ok(())
}

/// Parameters and activations take half the memory; the host still reads f32.
fn memory_is_halved(device: &Device) -> Result<(), Failed> {
    let memory = |precision| -> Result<(rankmix::graph::MemoryReport, Storage)> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let x = graph.input("x", TensorType::f32([64, 96]))?;
        let hidden = Linear::new("first", 96, 96).forward(&mut graph, x)?;
        let hidden = graph.silu(hidden)?;
        let y = Linear::new("second", 96, 96).forward(&mut graph, hidden)?;
        graph.output(y)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 0)?;
        let session = graph.compile(&store)?;
        Ok((session.memory(), session.storage(y)?))
    };
    let (wide, _) = memory(Precision::F32)?;
    let (narrow, storage) = memory(Precision::F16)?;
    let parameters = Precision {
        activations: Storage::F32,
        ..Precision::F16
    };
    let (parameters_only, _) = memory(parameters)?;
    let halved = narrow.parameters * 2 == wide.parameters
        && narrow.pool_lower_bound * 2 <= wide.pool_lower_bound + narrow.pool_lower_bound;
    if storage != Storage::F16
        || !halved
        || parameters_only.parameters != narrow.parameters
        || parameters_only.pool != wide.pool
    {
        return Err(format!("{wide:?}\n{narrow:?}\n{parameters_only:?}").into());
    }
    Ok(())
}

/// A parameter that a graph updates must be stored as the graph was built for; `convert` brings it there.
fn mixed_stores_are_sorted_out(device: &Device) -> Result<(), Failed> {
    let build = |precision| -> Result<(Graph, Value)> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let w = graph.parameter("w", [3, 5], Init::Ones, true)?;
        let loss = graph.sum_all(w)?;
        graph.output(loss)?;
        let gradients = graph.backward(loss)?;
        AdamW::default().add_to(&mut graph, &gradients)?;
        Ok((graph, loss))
    };
    let store = ParameterStore::new(device);
    store.insert("w", &floats(&[3, 5], 7))?;
    let (graph, _) = build(Precision::F16)?;
    store.initialize(&graph, 0)?;
    match graph.compile(&store) {
        Err(error) if error.to_string().contains("`w`") => {}
        other => return Err(format!("expected an error about `w`, found {other:?}").into()),
    }
    store.convert(&graph)?;
    graph.compile(&store)?;
    let stored = store.read("w")?.to_f32();
    let want: Vec<f32> = floats(&[3, 5], 7)
        .to_f32()
        .iter()
        .map(|x| f16::from_f32(*x).to_f32())
        .collect();
    if stored != want {
        return Err("converting changed more than the last digits".into());
    }
    // A graph that only reads takes what the store has.
    let mut reading = Graph::new();
    let w = reading.parameter("w", [3, 5], Init::Ones, false)?;
    let doubled = reading.scale(w, 2.0)?;
    reading.output(doubled)?;
    let mut session = reading.compile(&store)?;
    let got = session.run_reading(&[doubled])?.remove(0).to_f32();
    let twice: Vec<f32> = want.iter().map(|x| 2.0 * x).collect();
    if got == twice {
        Ok(())
    } else {
        Err("a graph in f32 read a parameter in 16 bits wrongly".into())
    }
}

/// A master copy that is not its parameter's any more gives way: f32 training between two trainings in 16 bits is not lost.
fn old_masters_give_way(device: &Device) -> Result<(), Failed> {
    let graph_in = |precision| -> Result<Graph> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let w = graph.parameter("w", [5], Init::Ones, true)?;
        let loss = graph.sum_all(w)?;
        let gradients = graph.backward(loss)?;
        AdamW::default().add_to(&mut graph, &gradients)?;
        Ok(graph)
    };
    let (narrow, wide) = (graph_in(Precision::F16)?, graph_in(Precision::F32)?);
    let store = ParameterStore::new(device);
    store.initialize(&narrow, 0)?;
    store.convert(&wide)?;
    // As a training in f32 does it: the parameter moves, nobody looks at the master.
    let trained = floats(&[5], 511);
    let mut moving = Graph::new();
    let x = moving.input("x", TensorType::f32([5]))?;
    let w = moving.parameter("w", [5], Init::Ones, true)?;
    moving.assign(w, x)?;
    let mut session = moving.compile(&store)?;
    session.write(x, &trained)?;
    session.run()?;
    store.convert(&narrow)?;
    let master = store.read("adamw.master.w")?.to_f32();
    if master != trained.to_f32() {
        return Err(format!("the master is {master:?}, the parameter was {trained:?}").into());
    }
    // The same through a file.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("orphan.safetensors");
    let mut file = rankmix::formats::TensorFile::default();
    file.tensors.insert("w".to_owned(), trained);
    file.tensors
        .insert("adamw.master.w".to_owned(), floats(&[5], 512));
    file.write(&path)?;
    let fresh = ParameterStore::new(device);
    fresh.initialize(&narrow, 0)?;
    fresh.load(&path)?;
    if fresh.read("adamw.master.w")?.to_f32() == master {
        Ok(())
    } else {
        Err("a master of other weights was loaded".into())
    }
}

/// What is asked for in f32 is in f32: a sum made there, and a parameter that any declaration wants there.
fn f32_is_kept(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    graph.set_precision(Precision::F16);
    let x = graph.input("x", TensorType::f32([6]))?;
    let half = graph.scale(x, 0.3)?;
    let other = graph.scale(x, 0.7)?;
    let sum = graph.in_f32(|graph| graph.accumulate(half, other))?;
    let shared = graph.parameter("shared", [6], Init::Ones, false)?;
    graph.in_f32(|graph| graph.parameter("shared", [6], Init::Ones, false))?;
    let product = graph.mul(sum, shared)?;
    graph.output(sum)?;
    graph.output(product)?;
    let store = ParameterStore::new(device);
    store.initialize(&graph, 0)?;
    let session = graph.compile(&store)?;
    let found = [
        session.storage(sum)?,
        session.storage(shared)?,
        session.storage(product)?,
    ];
    if found == [Storage::F32, Storage::F32, Storage::F16] {
        Ok(())
    } else {
        Err(format!("the sum, the parameter and the product are stored as {found:?}").into())
    }
}

/// All of the above that needs a device only, on one opened without `shader-f16`.
fn packed_works_without_f16(backend: &str) -> Result<(), Failed> {
    let (device, queue) = host::host_device(backend).ok_or("no adapter opens a device")?;
    let device = Device::from_wgpu(&device, &queue, false)?;
    if device
        .adapter()
        .is_some_and(|adapter| adapter.capabilities.f16)
    {
        return Err("the device has f16 though nobody asked for it".into());
    }
    halves_are_nearest(&device)?;
    training_follows_f32(&device)?;
    overflow_skips_the_step(&device)
}

/// Cases whose results do not hang on a choice that rounding may turn.
fn is_continuous(case: &Case) -> bool {
    // `[]`: a gradient that is a sum of a few rounded numbers that cancel; `nearly_1`: a slope of which rounding x leaves little.
    let left_out = ["route", "sort", "balance", "[]", "nearly_1"];
    case.differentiable && !left_out.iter().any(|name| case.name.contains(name))
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in [
        (
            "halves_are_nearest",
            halves_are_nearest as fn(&Device) -> Result<(), Failed>,
        ),
        ("training_follows_f32", training_follows_f32),
        ("overflow_skips_the_step", overflow_skips_the_step),
        (
            "masters_follow_what_is_loaded",
            masters_follow_what_is_loaded,
        ),
        ("memory_is_halved", memory_is_halved),
        ("old_masters_give_way", old_masters_give_way),
        ("f32_is_kept", f32_is_kept),
        ("mixed_stores_are_sorted_out", mixed_stores_are_sorted_out),
    ] {
        trials.extend(devices::own_trials(&format!("storage::{name}"), check));
    }
    trials.extend(devices::backend_trials(
        "storage::packed_works_without_f16",
        packed_works_without_f16,
    ));
    for case in cases::all().into_iter().filter(is_continuous) {
        let case = std::sync::Arc::new(case);
        let name = format!("storage::{}", case.name);
        trials.extend(devices::own_trials(&name, {
            move |device| check_case(&case, device, Precision::F16)
        }));
    }
    trials
}
