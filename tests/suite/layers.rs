//! Facts about whole layers, and layers of random shapes against the reference.

use libtest_mimic::{Failed, Trial};
use proptest::strategy::Strategy;
use rankmix::layers::{AdapterOptions, GateInput, Linear, MoeLora, RotMole, Routing};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, Init, ParameterStore, Result, Tensor, TensorType, Value};

use crate::case::{floats, floats_in};
use crate::metrics::relative_errors;
use crate::popularity::{Popularity, router, rows};
use crate::{devices, random};

/// A RotMoLE layer of any shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    d_in: usize,
    d_out: usize,
    rank: usize,
    experts: usize,
    top_k: usize,
    /// Where the router sends the tokens; `None`: wherever random weights do.
    popularity: Option<Popularity>,
    rotation: Rotation,
    gate_input: GateInput,
    bounded: bool,
    /// How large the rotation gate's weights are, times 1 / sqrt(their number): about the size of the angles.
    turn: f64,
}

impl Shape {
    fn layer(&self) -> Result<RotMole> {
        let mut layer = RotMole::with_rotation(
            Linear::new("layer", self.d_in, self.d_out),
            AdapterOptions::new(self.rank, 16.0),
            Routing::new(self.experts, self.top_k),
            self.rotation,
            self.gate_input,
        )?;
        layer.bounded = self.bounded;
        Ok(layer)
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
                Some("rotation_generator") => self.turn,
                _ => unit,
            };
            let tensor = if name == "layer.router" && self.popularity.is_some() {
                router(self.experts, self.d_in)
            } else {
                floats_in(&dims, 301 + seed as u64, -spread, spread)
            };
            store.insert(name, &tensor)?;
        }
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.write(x, &self.input())?;
        let results = session.run_reading(&values)?;
        assert_eq!(
            results,
            session.run_reading(&values)?,
            "a second run is not equal bit for bit"
        );
        Ok(results)
    }

    fn input(&self) -> Tensor {
        let dims = [self.tokens, self.d_in];
        match self.popularity {
            Some(popularity) => rows(popularity, dims, self.top_k, self.experts),
            None => floats(&dims, 310),
        }
    }
}

/// Where the gradient of the router is in the results of [`Shape::run`]: after output, experts, and the gradients of x, the
/// rotation gate and the base weight.
const ROUTER: usize = 5;

fn shapes() -> impl Strategy<Value = Shape> {
    let sizes = (1..70_usize, 1..90_usize, 1..90_usize, 1..20_usize);
    let tokens = proptest::prop_oneof![proptest::strategy::Just(1_usize), 2..8_usize, 8..201_usize];
    let popularity = proptest::option::of(proptest::sample::select(&Popularity::ALL[..]));
    let kinds = (0..Rotation::ALL.len(), 1..6_usize, 1..9_usize);
    let gates = (
        proptest::sample::select(&[GateInput::Input, GateInput::Latent, GateInput::Static][..]),
        proptest::bool::ANY,
    );
    (sizes, tokens, kinds, gates, popularity).prop_map(
        |(sizes, tokens, (kind, layers, top_k), (gate_input, bounded), popularity)| {
            let (experts, d_in, d_out, half) = sizes;
            let rotation = match Rotation::ALL[kind] {
                Rotation::BrickWall { .. } => Rotation::BrickWall { layers },
                other => other,
            };
            let experts = if experts > 64 { 1 } else { experts };
            Shape {
                tokens,
                // A coordinate for each expert.
                d_in: if popularity.is_some() {
                    d_in.max(experts)
                } else {
                    d_in
                },
                d_out,
                rank: if rotation == Rotation::Planes {
                    2 * half
                } else {
                    half + 1
                },
                experts,
                top_k: top_k.min(experts),
                popularity,
                rotation,
                gate_input,
                bounded,
                turn: 1.0,
            }
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
            popularity: None,
            rotation,
            gate_input,
            bounded: false,
            turn,
        };
        matches_reference(device, &shape)?;
    }
    Ok(())
}

/// A layer that does not rotate by tokens is a mixture without rotations whose B_j are B_j R_j, made here from R_j of the f64 reference:
/// the same output, the same gradients of x, of A, of the router and of what both have in common.
fn constant_rotations_are_absorbed(device: &Device, shape: &Shape) -> Result<(), String> {
    let check = || -> Result<Option<String>> {
        let Shape {
            tokens,
            d_in,
            d_out,
            rank,
            experts,
            ..
        } = *shape;
        let layer = shape.layer()?;
        let numbers = shape.rotation.numbers(rank)?;
        let generator = floats_in(&[experts, numbers], 330, -1.5, 1.5);
        let b = floats(&[experts, d_out, rank], 331);

        let bounded = |number: f64| {
            if shape.bounded {
                std::f64::consts::PI * number.tanh()
            } else {
                number
            }
        };
        let generator_rows: Vec<f64> = generator
            .to_f64()
            .chunks(numbers)
            .flat_map(|row| row.repeat(rank))
            .map(bounded)
            .collect();
        let mut graph = Graph::new();
        let unit = (0..experts * rank * rank)
            .map(|at| {
                if at / rank % rank == at % rank {
                    1.0
                } else {
                    0.0
                }
            })
            .collect();
        let unit = graph.constant(Tensor::f64([experts * rank, rank], unit)?)?;
        let rows = graph.constant(Tensor::f64([experts * rank, numbers], generator_rows)?)?;
        let columns = graph.rotate(shape.rotation, unit, rows)?;
        graph.output(columns)?;
        let reference = ParameterStore::new(&Device::reference());
        let columns = graph.compile(&reference)?.run_reading(&[columns])?[0].to_f64();
        // Column i of R_j is row j rank + i.
        let b_values = b.to_f64();
        let product = (0..experts * d_out * rank).map(|at| {
            let (expert, row, i) = (at / (d_out * rank), at / rank % d_out, at % rank);
            let b = &b_values[(expert * d_out + row) * rank..][..rank];
            let column = &columns[(expert * rank + i) * rank..][..rank];
            b.iter().zip(column).map(|(b, r)| b * r).sum::<f64>()
        });
        let product = Tensor::f64([experts, d_out, rank], product.collect())?;

        let run = |b: &Tensor, forward: &dyn Fn(&mut Graph, Value) -> Result<Value>| {
            let mut graph = Graph::new();
            let x = graph.input("x", TensorType::f32([tokens, d_in]))?;
            let y = forward(&mut graph, x)?;
            let upstream = graph.constant(floats(&[tokens, d_out], 332))?;
            let mut wanted = vec![x];
            for name in ["layer.weight", "layer.lora_a", "layer.router"] {
                wanted.push(graph.named(name)?);
            }
            let mut values = graph.gradients_from(&[(y, upstream)], &wanted)?;
            values.insert(0, y);
            for &value in &values {
                graph.output(value)?;
            }
            let store = ParameterStore::new(device);
            let unit = 1.0 / (d_in as f64).sqrt();
            let weights = [
                ("layer.weight", vec![d_out, d_in], unit),
                ("layer.lora_a", vec![experts, rank, d_in], unit),
                ("layer.router", vec![experts, d_in], 4.0),
            ];
            for (seed, (name, dims, spread)) in weights.into_iter().enumerate() {
                store.insert(name, &floats_in(&dims, 333 + seed as u64, -spread, spread))?;
            }
            store.insert("layer.lora_b", b)?;
            store.insert("layer.rotation_generator", &generator)?;
            let mut session = graph.compile(&store)?;
            session.poison()?;
            session.write(x, &floats(&[tokens, d_in], 340))?;
            session.run_reading(&values)
        };
        let rotated = run(&b, &|graph, x| Ok(layer.forward(graph, x)?.output))?;
        let absorbed = run(&product, &|graph, x| {
            Ok(layer.mixture.forward(graph, x)?.output)
        })?;
        for (index, (got, want)) in rotated.iter().zip(&absorbed).enumerate() {
            let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
            // With few tokens the router's gradient is a difference of nearly equal numbers that nothing averages out.
            let slack = if index == 4 && tokens < 8 { 20.0 } else { 1.0 };
            if norm > slack * 1e-5 || largest > slack * 1e-4 {
                return Ok(Some(format!(
                    "{shape:?}, result {index}: {norm:.2e} in norm, {largest:.2e} of the largest"
                )));
            }
        }
        Ok(None)
    };
    match check() {
        Ok(None) => Ok(()),
        Ok(Some(difference)) => Err(difference),
        Err(error) => Err(error.to_string()),
    }
}

/// The output of RotMoLE whose rotation gate is zero, and of MoE-LoRA, on the same parameters.
fn a_gate_of_zero_is_moe_lora(device: &Device, rotation: Rotation) -> Result<(), Failed> {
    let (tokens, d_in, d_out) = (19, 24, 17);
    let store = ParameterStore::new(device);
    let run = |forward: &dyn Fn(&mut Graph, Value) -> Result<Value>| -> Result<Tensor> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([tokens, d_in]))?;
        let y = forward(&mut graph, x)?;
        graph.output(y)?;
        store.remove("layer.rotation_gate");
        store.initialize(&graph, 5)?;
        store.insert("layer.lora_b", &floats(&[5, d_out, 6], 320))?;
        let mut session = graph.compile(&store)?;
        session.write(x, &floats(&[tokens, d_in], 321))?;
        Ok(session.run_reading(&[y])?.remove(0))
    };
    for gate_input in [GateInput::Input, GateInput::Latent, GateInput::Static] {
        let rotated = RotMole::with_rotation(
            Linear::new("layer", d_in, d_out),
            AdapterOptions::new(6, 12.0),
            Routing::new(5, 2),
            rotation,
            gate_input,
        )?;
        let mixture: &MoeLora = &rotated.mixture;
        let without = run(&|graph, x| Ok(mixture.forward(graph, x)?.output))?;
        for layer in [rotated.clone(), rotated.clone().with_bounded_generator()] {
            let with = run(&|graph, x| Ok(layer.forward(graph, x)?.output))?;
            if with != without {
                return Err(format!("{layer:?}: not equal bit for bit").into());
            }
        }
    }
    Ok(())
}

/// What a layer says it trains is what its graph declares as trainable.
fn trainable_elements_are_counted() -> Result<(), Failed> {
    for rotation in Rotation::ALL {
        for gate_input in [GateInput::Input, GateInput::Latent, GateInput::Static] {
            let layer = RotMole::with_rotation(
                Linear::new("layer", 24, 17),
                AdapterOptions::new(6, 12.0),
                Routing::new(5, 2),
                rotation,
                gate_input,
            )?;
            let mut graph = Graph::new();
            let x = graph.input("x", TensorType::f32([3, 24]))?;
            layer.forward(&mut graph, x)?;
            let (said, declared) = (layer.trainable_elements()?, graph.trainable_elements());
            if said != declared {
                return Err(format!("{layer:?}: {said} is said, {declared} are declared").into());
            }
        }
    }
    Ok(())
}

/// A linear layer's bias is added to every row of its product, and its gradient is the column sum of the output's.
fn a_linear_bias_is_added_to_every_row(device: &Device) -> Result<(), Failed> {
    let (tokens, d_in, d_out) = (37, 12, 9);
    let layer = Linear::new("layer", d_in, d_out).trained();
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([tokens, d_in]))?;
    let dy = graph.input("dy", TensorType::f32([tokens, d_out]))?;
    let with = layer.clone().with_bias().forward(&mut graph, x)?;
    let without = layer.forward(&mut graph, x)?;
    let bias = graph.parameter("layer.bias", [d_out], Init::Zeros, true)?;
    let gradient = graph.gradients_from(&[(with, dy)], &[bias])?[0];
    let sum = graph.sum(dy, &[0])?;
    let values = [with, without, bias, gradient, sum];
    for value in values {
        graph.output(value)?;
    }
    let store = ParameterStore::new(device);
    store.initialize(&graph, 6)?;
    store.insert("layer.bias", &floats(&[d_out], 330))?;
    let mut session = graph.compile(&store)?;
    session.write(x, &floats(&[tokens, d_in], 331))?;
    session.write(dy, &floats(&[tokens, d_out], 332))?;
    let read = session.run_reading(&values)?;
    let [with, without, bias, gradient, sum] = [0, 1, 2, 3, 4].map(|i: usize| read[i].to_f64());
    let rows = without.chunks(d_out);
    let added: Vec<f64> = rows
        .flat_map(|row| row.iter().zip(&bias).map(|(y, b)| y + b))
        .collect();
    for (what, got, want) in [("the output", with, added), ("the gradient", gradient, sum)] {
        let (norm, largest) = relative_errors(&got, &want);
        if norm > 1e-6 || largest > 1e-5 {
            return Err(format!("{what}: relative error {norm:.2e}, {largest:.2e}").into());
        }
    }
    Ok(())
}

/// The experts in another order, with everything that is theirs: the same output bit for bit, since a token's slots keep their order,
/// and the same gradients in that order.
fn the_order_of_experts_does_not_matter(device: &Device) -> Result<(), Failed> {
    let shape = Shape {
        tokens: 53,
        d_in: 30,
        d_out: 21,
        rank: 6,
        experts: 7,
        top_k: 3,
        popularity: None,
        rotation: Rotation::Planes,
        gate_input: GateInput::Input,
        bounded: false,
        turn: 1.0,
    };
    let order = [3, 0, 6, 1, 5, 2, 4];
    let permuted = |tensor: &Tensor| -> Result<Tensor> {
        let values = tensor.to_f64();
        let block = values.len() / order.len();
        let blocks = order
            .iter()
            .flat_map(|&from| &values[from * block..(from + 1) * block]);
        Tensor::f64(tensor.shape(), blocks.copied().collect())
    };
    let names = ["router", "lora_a", "lora_b", "rotation_gate"].map(|name| format!("layer.{name}"));
    let run = |permute: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([shape.tokens, shape.d_in]))?;
        let y = shape.layer()?.forward(&mut graph, x)?.output;
        let upstream = graph.constant(floats(&[shape.tokens, shape.d_out], 350))?;
        let mut wanted = vec![x];
        let store = ParameterStore::new(device);
        store.insert("layer.weight", &floats(&[shape.d_out, shape.d_in], 351))?;
        for (seed, name) in names.iter().enumerate() {
            let value = graph.named(name)?;
            let tensor = floats(graph.ty(value)?.dims(), 352 + seed as u64);
            store.insert(name, &if permute { permuted(&tensor)? } else { tensor })?;
            wanted.push(value);
        }
        let mut values = graph.gradients_from(&[(y, upstream)], &wanted)?;
        values.insert(0, y);
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.write(x, &shape.input())?;
        session.run_reading(&values)
    };
    let (source, other) = (run(false)?, run(true)?);
    if source[0] != other[0] {
        return Err("the output is not equal bit for bit".into());
    }
    for (index, (got, want)) in other.iter().zip(&source).enumerate().skip(1) {
        let want = if index == 1 {
            want.clone()
        } else {
            permuted(want)?
        };
        let (norm, _) = relative_errors(&got.to_f64(), &want.to_f64());
        if norm > 1e-5 {
            return Err(format!("gradient {index}: {norm:.2e} in norm").into());
        }
    }
    Ok(())
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
        if !(1.0..=1.05).contains(&ratio) {
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
            let cases = if device.adapter().is_some() { 24 } else { 200 };
            random::holds("rotmole", cases, shapes(), |shape| {
                matches_reference(device, shape)
            })
        },
    ));
    trials.extend(devices::trials(
        "layers::constant_rotations_are_absorbed_by_b",
        |device| {
            let cases = if device.adapter().is_some() { 12 } else { 100 };
            let still = shapes().prop_map(|shape| Shape {
                gate_input: GateInput::Static,
                ..shape
            });
            random::holds("rotmole_static", cases, still, |shape| {
                constant_rotations_are_absorbed(device, shape)
            })
        },
    ));
    trials.extend(devices::trials(
        "layers::the_order_of_experts_does_not_matter",
        the_order_of_experts_does_not_matter,
    ));
    trials.extend(devices::trials(
        "layers::a_linear_bias_is_added_to_every_row",
        a_linear_bias_is_added_to_every_row,
    ));
    trials.push(Trial::test(
        "layers::rotmole_trainable_elements_are_counted",
        trainable_elements_are_counted,
    ));
    trials.extend(devices::own_trials(
        "layers::memory_is_near_the_lower_bound",
        memory_is_near_the_lower_bound,
    ));
    trials
}
