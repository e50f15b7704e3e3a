//! Facts about whole layers, and layers of random shapes against the reference.

use libtest_mimic::{Failed, Trial};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rankmix::layers::{AdapterOptions, GateInput, Linear, MoeLora, RotMole, Routing};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType, Value};

use crate::case::{floats, floats_in};
use crate::devices;
use crate::metrics::relative_errors;

/// A RotMoLE layer of any shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    d_in: usize,
    d_out: usize,
    rank: usize,
    experts: usize,
    top_k: usize,
    rotation: Rotation,
    gate_input: GateInput,
    /// How large the rotation gate's weights are, times 1 / sqrt(their number): about the size of the angles.
    turn: f64,
}

impl Shape {
    fn layer(&self) -> Result<RotMole> {
        RotMole::with_rotation(
            Linear::new("layer", self.d_in, self.d_out),
            AdapterOptions::new(self.rank, 16.0),
            Routing::new(self.experts, self.top_k),
            self.rotation,
            self.gate_input,
        )
    }

    /// Output, experts and all gradients.
    fn run(&self, device: &Device) -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([self.tokens, self.d_in]))?;
        let routed = self.layer()?.forward(&mut graph, x)?;
        let upstream = graph.constant(floats(&[self.tokens, self.d_out], 300))?;
        let names: Vec<String> = graph
            .parameters()
            .iter()
            .map(|spec| spec.name.clone())
            .collect();
        let parameters = names
            .iter()
            .map(|name| graph.named(name))
            .collect::<Result<Vec<Value>>>()?;
        let wanted: Vec<Value> = [x].into_iter().chain(parameters.iter().copied()).collect();
        let gradients = graph.gradients_from(&[(routed.output, upstream)], &wanted)?;
        let values: Vec<Value> = [routed.output, routed.routed.experts()]
            .into_iter()
            .chain(gradients)
            .collect();
        let store = ParameterStore::new(device);
        for (seed, (name, &value)) in names.iter().zip(&parameters).enumerate() {
            let dims = graph.ty(value)?.dims().to_vec();
            // Logits far apart: rounding must not decide which experts are chosen.
            let unit = 1.0 / (*dims.last().unwrap_or(&1) as f64).sqrt();
            let spread = match name.rsplit('.').next() {
                Some("router") => 4.0,
                Some("rotation_gate") => self.turn * unit,
                _ => unit,
            };
            store.insert(name, &floats_in(&dims, 301 + seed as u64, -spread, spread))?;
        }
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.write(x, &floats(&[self.tokens, self.d_in], 310))?;
        session.run_reading(&values)
    }
}

/// Where the gradient of the router is in the results of [`Shape::run`]: after output, experts, and the gradients of x, the
/// rotation gate and the base weight.
const ROUTER: usize = 5;

fn shapes() -> impl Strategy<Value = Shape> {
    let sizes = (1..70_usize, 1..90_usize, 1..90_usize, 1..20_usize);
    let tokens = proptest::prop_oneof![proptest::strategy::Just(1_usize), 2..8_usize, 8..140_usize];
    let kinds = (0..3_usize, proptest::bool::ANY, 1..9_usize);
    (sizes, tokens, kinds).prop_map(
        |((experts, d_in, d_out, half), tokens, (kind, latent, top_k))| Shape {
            tokens,
            d_in,
            d_out,
            rank: if kind == 0 { 2 * half } else { half + 1 },
            experts: if experts > 64 { 1 } else { experts },
            top_k: top_k.min(if experts > 64 { 1 } else { experts }),
            rotation: Rotation::ALL[kind],
            gate_input: if latent {
                GateInput::Latent
            } else {
                GateInput::Input
            },
            turn: 1.0,
        },
    )
}

/// Compares a layer with the f64 reference: the same experts, every result within the tolerances.
fn matches_reference(device: &Device, shape: &Shape) -> Result<(), String> {
    let want = shape
        .run(&Device::reference())
        .map_err(|error| error.to_string())?;
    let got = shape.run(device).map_err(|error| error.to_string())?;
    if got[1] != want[1] {
        return Err("other experts were chosen".to_owned());
    }
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
        let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
        // With few tokens the router's gradient is a difference of nearly equal numbers that nothing averages out.
        let slack = if index == ROUTER && shape.tokens < 8 {
            20.0
        } else {
            1.0
        };
        if norm > slack * 1e-5 || largest > slack * 1e-4 {
            return Err(format!(
                "{shape:?}, result {index}: {norm:.2e} in norm, {largest:.2e} of the largest"
            ));
        }
    }
    Ok(())
}

/// Shapes at the ends of what there is: tokens, d_in, d_out, rank, experts, top k, size of the angles.
const EXTREMES: [(usize, usize, usize, usize, usize, usize, f64); 8] = [
    (1, 1, 1, 2, 1, 1, 1.0),
    (1, 33, 7, 2, 64, 64, 1.0),
    (9, 70, 66, 64, 3, 2, 0.2),
    (133, 48, 40, 64, 64, 8, 0.2),
    (40, 64, 64, 16, 1, 1, 1.0),
    (37, 65, 131, 6, 5, 5, 1.0),
    (64, 64, 48, 8, 4, 2, 40.0),
    (33, 1024, 24, 8, 4, 2, 15.0),
];

fn extremes(device: &Device, rotation: Rotation) -> Result<(), Failed> {
    for (tokens, d_in, d_out, rank, experts, top_k, turn) in EXTREMES {
        // A Cayley rotation by a large generator is nearly a reflection of all it meets: its numbers stay small.
        let turn = if rotation == Rotation::Cayley {
            turn.min(1.0)
        } else {
            turn
        };
        let gate_input = GateInput::Input;
        let shape = Shape {
            tokens,
            d_in,
            d_out,
            rank,
            experts,
            top_k,
            rotation,
            gate_input,
            turn,
        };
        matches_reference(device, &shape)?;
    }
    Ok(())
}

fn random_shapes(device: &Device, cases: u32) -> Result<(), Failed> {
    let mut runner = TestRunner::new_with_rng(
        Config {
            cases,
            failure_persistence: None,
            ..Config::default()
        },
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let outcome = runner.run(&shapes(), |shape| {
        matches_reference(device, &shape).map_err(TestCaseError::fail)
    });
    outcome.map_err(|error| error.to_string().into())
}

/// The output of RotMoLE whose rotation gate is zero, and of MoE-LoRA, on the same parameters.
fn a_gate_of_zero_is_moe_lora(device: &Device, rotation: Rotation) -> Result<(), Failed> {
    let (tokens, d_in, d_out) = (19, 24, 17);
    let rotated = RotMole::with_rotation(
        Linear::new("layer", d_in, d_out),
        AdapterOptions::new(6, 12.0),
        Routing::new(5, 2),
        rotation,
        GateInput::Input,
    )?;
    let store = ParameterStore::new(device);
    let run = |forward: &dyn Fn(&mut Graph, Value) -> Result<Value>| -> Result<Tensor> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([tokens, d_in]))?;
        let y = forward(&mut graph, x)?;
        graph.output(y)?;
        store.initialize(&graph, 5)?;
        store.insert("layer.lora_b", &floats(&[5, d_out, 6], 320))?;
        let mut session = graph.compile(&store)?;
        session.write(x, &floats(&[tokens, d_in], 321))?;
        Ok(session.run_reading(&[y])?.remove(0))
    };
    let with: Tensor = run(&|graph, x| Ok(rotated.forward(graph, x)?.output))?;
    let mixture: &MoeLora = &rotated.mixture;
    let without = run(&|graph, x| Ok(mixture.forward(graph, x)?.output))?;
    if with == without {
        Ok(())
    } else {
        Err("they are not equal bit for bit".into())
    }
}

/// The memory of a RotMoLE training step against its lower bound.
fn memory_is_near_the_lower_bound(device: &Device) -> Result<(), Failed> {
    for (tokens, width, rank) in [(512, 256, 16), (256, 128, 8), (133, 96, 4)] {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([tokens, width]))?;
        let labels = graph.input("labels", TensorType::i32([tokens]))?;
        let options = AdapterOptions::new(rank, 16.0);
        let first = RotMole::new(
            Linear::new("first", width, width),
            options,
            Routing::new(8, 2),
        )?;
        let second = RotMole::new(
            Linear::new("second", width, width),
            options,
            Routing::new(8, 2),
        )?;
        let hidden = first.forward(&mut graph, x)?;
        let active = graph.silu(hidden.output)?;
        let logits = second.forward(&mut graph, active)?;
        let mut loss = graph.cross_entropy(logits.output, labels)?;
        for routed in [hidden, logits] {
            let auxiliary = routed.auxiliary_loss(&mut graph, 0.01, 0.001)?;
            loss = graph.add(loss, auxiliary)?;
        }
        graph.output(loss)?;
        let gradients = graph.backward(loss)?;
        rankmix::train::AdamW::default().add_to(&mut graph, &gradients)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 0)?;
        let memory = graph.compile(&store)?.memory();
        let ratio = memory.pool as f64 / memory.pool_lower_bound as f64;
        println!(
            "{tokens} tokens, width {width}: pool {} bytes, {ratio:.3} of the lower bound",
            memory.pool
        );
        if !(1.0..=1.1).contains(&ratio) {
            return Err(format!(
                "{tokens} tokens, width {width}: {memory:?}: {ratio:.3} times the lower bound"
            )
            .into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for rotation in Rotation::ALL {
        let name = format!("layers::rotmole_{rotation}_with_a_gate_of_zero_is_moe_lora");
        trials.extend(devices::trials(&name, move |device| {
            a_gate_of_zero_is_moe_lora(device, rotation)
        }));
        let name = format!("layers::rotmole_{rotation}_of_extreme_shapes");
        trials.extend(devices::trials(&name, move |device| {
            extremes(device, rotation)
        }));
    }
    trials.extend(devices::trials(
        "layers::rotmole_of_random_shapes",
        |device| {
            // A new shape is a new set of pipelines: on a GPU half a second each.
            random_shapes(device, if device.adapter().is_some() { 24 } else { 200 })
        },
    ));
    trials.extend(devices::own_trials(
        "layers::memory_is_near_the_lower_bound",
        memory_is_near_the_lower_bound,
    ));
    trials
}
