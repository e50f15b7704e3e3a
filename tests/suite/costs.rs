//! What operations and graphs say that they cost, against numbers counted by hand; and the command that holds them against a device's limits.

use std::process::Command;

use libtest_mimic::{Completion, Failed, Trial};
use rankmix::graph::Cost;
use rankmix::layers::{AdapterOptions, Linear, Lora};
use rankmix::ops::{Activation, Layout, MatMul, Projection, Rotation, Routed};
use rankmix::{Device, DeviceOptions, Graph, Init, Precision, Result, TensorType, Value};

type Build = fn(&mut Graph) -> Result<Value>;
type Check = fn() -> Result<(), Failed>;

fn f(graph: &mut Graph, name: &str, dims: &[usize]) -> Result<Value> {
    graph.input(name, TensorType::f32(dims))
}

fn experts(graph: &mut Graph, dims: [usize; 2]) -> Result<Value> {
    graph.input("experts", TensorType::i32(dims))
}

/// The last operation of each graph, FLOP and bytes counted by hand.
const COUNTED: &[(&str, Build, u64, u64)] = &[
    // 2 m n k; both operands and the result.
    (
        "matmul",
        |g| {
            let (a, b) = (f(g, "a", &[3, 5])?, f(g, "b", &[5, 7])?);
            g.matmul(a, b)
        },
        2 * 3 * 5 * 7,
        4 * (15 + 35 + 21),
    ),
    // Two products, one matrix for both.
    (
        "matmul_batched",
        |g| {
            let (a, b) = (f(g, "a", &[2, 3, 5])?, f(g, "b", &[7, 5])?);
            let options = MatMul {
                transpose_b: true,
                ..MatMul::default()
            };
            g.matmul_with(a, b, options, None)
        },
        2 * 2 * 3 * 5 * 7,
        4 * (30 + 35 + 42),
    ),
    // A matrix with itself is read once.
    (
        "matmul_of_one",
        |g| {
            let a = f(g, "a", &[4, 4])?;
            g.matmul(a, a)
        },
        128,
        4 * (16 + 16),
    ),
    // 6 pairs; x [3, 10], of 8 matrices [4, 10] at most 6, order 6, offsets 9, z [6, 4].
    (
        "shrink",
        |g| {
            let (x, w) = (f(g, "x", &[3, 10])?, f(g, "w", &[8, 4, 10])?);
            let experts = experts(g, [3, 2])?;
            let segments = g.segments(experts, 8)?;
            g.shrink(x, w, Layout::OutIn, segments)
        },
        2 * 6 * 4 * 10,
        4 * (30 + 6 * 40 + 6 + 9 + 24),
    ),
    // 6 pairs; z [6, 4], two matrices [10, 4], experts 6, gates 6, y [3, 10]; the gate on the narrow side.
    (
        "expand",
        |g| {
            let (z, w) = (f(g, "z", &[6, 4])?, f(g, "w", &[2, 10, 4])?);
            let (gates, experts) = (f(g, "gates", &[3, 2])?, experts(g, [3, 2])?);
            let segments = g.segments(experts, 2)?;
            g.expand(z, w, Layout::OutIn, Routed { gates, segments }, 1.0, None)
        },
        6 * (2 * 10 * 4 + 4),
        4 * (24 + 80 + 6 + 6 + 30),
    ),
    // 6 pairs; x [3, 10], A [2, 4, 10], V [2, 2, 10], order 6, offsets 3, u [6, 4]; two planes a pair, eight FLOP each.
    (
        "rotated_shrink",
        |g| {
            let x = f(g, "x", &[3, 10])?;
            let (a, v) = (f(g, "a", &[2, 4, 10])?, f(g, "v", &[2, 2, 10])?);
            let experts = experts(g, [3, 2])?;
            let segments = g.segments(experts, 2)?;
            Ok(g.rotated_shrink(x, a, v, segments)?[0])
        },
        6 * (2 * (4 + 2) * 10 + 2 * 8),
        4 * (30 + 80 + 40 + 6 + 3 + 24),
    ),
    // The weight gradient of shrink: dz [6, 4], x [3, 10], order 6, offsets 3, dW [2, 4, 10].
    (
        "segment_outer",
        |g| {
            let (x, w) = (f(g, "x", &[3, 10])?, f(g, "w", &[2, 4, 10])?);
            let (dz, experts) = (f(g, "dz", &[6, 4])?, experts(g, [3, 2])?);
            let segments = g.segments(experts, 2)?;
            let z = g.shrink(x, w, Layout::OutIn, segments)?;
            Ok(g.gradients_from(&[(z, dz)], &[w])?[0])
        },
        6 * 2 * 4 * 10,
        4 * (24 + 30 + 6 + 3 + 80),
    ),
    // 6 pairs, two products [10 to 4], silu (4) and a product; x once, both weights, order 6, offsets 3; only h is wanted.
    (
        "gated_experts",
        |g| {
            let x = f(g, "x", &[3, 10])?;
            let (gate, up) = (f(g, "gate", &[2, 4, 10])?, f(g, "up", &[2, 4, 10])?);
            let experts = experts(g, [3, 2])?;
            let segments = g.segments(experts, 2)?;
            let of = |weight| Projection { x, weight };
            g.gated_experts(Activation::Silu, of(gate), Some(of(up)), segments, None)
        },
        6 * 4 * (2 * 2 * 10 + 5),
        4 * (30 + 80 + 80 + 6 + 3 + 24),
    ),
    // 3 different rows of 100 at most.
    (
        "embedding",
        |g| {
            let table = f(g, "table", &[100, 6])?;
            let ids = g.input("ids", TensorType::i32([3]))?;
            g.embedding(table, ids)
        },
        0,
        4 * (18 + 3 + 18),
    ),
    // 2 planes a row, eight FLOP each.
    (
        "rotate_planes",
        |g| {
            let (z, angles) = (f(g, "z", &[5, 4])?, f(g, "angles", &[5, 2])?);
            g.rotate(Rotation::Planes, z, angles)
        },
        5 * 2 * 8,
        4 * (20 + 10 + 20),
    ),
    // Rank 2: a column with one row below it (a division, a multiply-add right of it and one of z), back substitution 3 + 1, y 4.
    (
        "rotate_cayley",
        |g| {
            let (z, q) = (f(g, "z", &[5, 2])?, f(g, "q", &[5, 1])?);
            g.rotate(Rotation::Cayley, z, q)
        },
        5 * (5 + 4 + 4),
        4 * (10 + 5 + 10),
    ),
    // Only the gates are wanted: of 8 logits two become scores, the experts and norms need not be written.
    (
        "route",
        |g| {
            let logits = f(g, "logits", &[5, 8])?;
            Ok(g.route(logits, 2, true)?.gates)
        },
        5 * 2 * 4,
        4 * (40 + 10),
    ),
    // Only the entropy is wanted: five FLOP a logit, four a token; the logits, the offsets of 8 experts.
    (
        "router_metrics",
        |g| {
            let logits = f(g, "logits", &[3, 8])?;
            let experts = experts(g, [3, 2])?;
            let segments = g.segments(experts, 8)?;
            Ok(g.router_metrics(logits, segments, None)?.entropy)
        },
        3 * (5 * 8 + 4),
        4 * (24 + 9 + 1),
    ),
    // A view costs nothing.
    (
        "reshape",
        |g| {
            let x = f(g, "x", &[4, 6])?;
            g.reshape(x, [3, 8])
        },
        0,
        0,
    ),
    (
        "broadcast",
        |g| {
            let (a, b) = (f(g, "a", &[4, 6])?, f(g, "b", &[6])?);
            g.add(a, b)
        },
        24,
        4 * (24 + 6 + 24),
    ),
];

fn last_operation_costs(build: Build, flops: u64, bytes: u64) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let value = build(&mut graph)?;
    graph.output(value)?;
    let costs = graph.operation_costs()?;
    let found = costs.last().ok_or("nothing is live")?.cost;
    if found == (Cost { flops, bytes }) {
        Ok(())
    } else {
        Err(format!("{found:?}, counted {flops} and {bytes}").into())
    }
}

fn lora(precision: Precision) -> Result<Graph> {
    let mut graph = Graph::new();
    graph.set_precision(precision);
    let x = f(&mut graph, "x", &[6, 16])?;
    let layer = Lora::new(Linear::new("layer", 16, 8), AdapterOptions::new(4, 8.0))?;
    let y = layer.forward(&mut graph, x)?;
    graph.output(y)?;
    Ok(graph)
}

/// Three products: x W, x A, and the one that is added into the first.
fn a_layer_costs_its_operations() -> Result<(), Failed> {
    let cost = lora(Precision::F32)?.cost()?;
    let (base, a, b) = (6 * 16 * 8, 6 * 16 * 4, 6 * 4 * 8);
    assert_eq!(cost.flops, 2 * (base + a + b));
    let moved = (6 * 16 + 16 * 8 + 6 * 8) + (6 * 16 + 16 * 4 + 6 * 4) + (6 * 4 + 4 * 8 + 2 * 6 * 8);
    assert_eq!(cost.bytes, 4 * moved);
    Ok(())
}

/// In 16 bits everything but the input x, which is read twice, is half as large.
fn halves_are_half_as_many_bytes() -> Result<(), Failed> {
    let (wide, narrow) = (lora(Precision::F32)?.cost()?, lora(Precision::F16)?.cost()?);
    let x = 2 * 4 * 6 * 16;
    assert_eq!(narrow.bytes, x + (wide.bytes - x) / 2);
    assert_eq!(narrow.flops, wide.flops);
    Ok(())
}

fn dead_operations_cost_nothing() -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = f(&mut graph, "x", &[8])?;
    let kept = graph.exp(x)?;
    graph.ln(x)?;
    graph.output(kept)?;
    let expected = Cost {
        flops: 8,
        bytes: 64,
    };
    assert_eq!(graph.cost()?, expected);
    Ok(())
}

/// Three values are read and written, the gradient and the schedule are read.
fn an_update_reads_and_writes() -> Result<(), Failed> {
    let mut graph = Graph::new();
    let gradient = f(&mut graph, "gradient", &[10])?;
    let schedule = f(&mut graph, "schedule", &[3])?;
    let [parameter, first, second] =
        ["p", "m", "v"].map(|name| graph.parameter(name, [10], Init::Zeros, true));
    let constants = rankmix::ops::AdamWConstants::default();
    let moments = [first?, second?];
    graph.adamw_step(parameter?, moments, gradient, schedule, None, constants)?;
    let cost = graph.cost()?;
    assert_eq!(cost.flops, 140);
    assert_eq!(cost.bytes, 4 * (7 * 10 + 3));
    Ok(())
}

/// The command runs, what it prints can be read, and every row has its numbers.
fn the_command_prints_json(program: &str, device: &str) -> Result<(), Failed> {
    let output = Command::new(program)
        .args(["roofline", "--json", "--only", "lora", "--device", device])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    for limit in ["flops_per_second", "bytes_per_second"] {
        let value = report["limits"][limit].as_f64();
        if value.is_none_or(|value| value < 1e6) {
            return Err(format!("{limit} is {value:?}").into());
        }
    }
    let rows = report["rows"].as_array().ok_or("there are no rows")?;
    // LoRA and MoE-LoRA, each way.
    assert_eq!(rows.len(), 4);
    for row in rows {
        let share = row["share"].as_f64().ok_or("a row without a share")?;
        let sound =
            share > 0.0 && row["flops"].as_u64() > Some(0) && row["launches"].as_u64() > Some(2);
        if !sound {
            return Err(format!("{row}").into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = COUNTED
        .iter()
        .map(|&(name, build, flops, bytes)| {
            Trial::test(format!("costs::{name}"), move || {
                last_operation_costs(build, flops, bytes)
            })
        })
        .collect();
    let whole: [(&str, Check); 4] = [
        ("a_layer_costs_its_operations", a_layer_costs_its_operations),
        (
            "halves_are_half_as_many_bytes",
            halves_are_half_as_many_bytes,
        ),
        ("dead_operations_cost_nothing", dead_operations_cost_nothing),
        ("an_update_reads_and_writes", an_update_reads_and_writes),
    ];
    trials.extend(
        whole
            .into_iter()
            .map(|(name, test)| Trial::test(format!("costs::{name}"), test)),
    );
    for device in ["cpu", "vulkan"] {
        let name = format!("costs::the_command_prints_json::{device}");
        trials.push(Trial::ignorable_test(name, move || {
            let Some(program) = option_env!("CARGO_BIN_EXE_rankmix") else {
                return Ok(Completion::ignored_with(
                    "there is no program without the feature `cli`",
                ));
            };
            let request = Some(device.to_owned());
            if let Err(error) = Device::open_with(&DeviceOptions {
                request,
                ..DeviceOptions::default()
            }) {
                return Ok(Completion::ignored_with(error.to_string()));
            }
            the_command_prints_json(program, device)?;
            Ok(Completion::Completed)
        }));
    }
    trials
}
