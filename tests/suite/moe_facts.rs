//! Facts about MoE and latent MoE, on every device.

use std::collections::HashMap;

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{
    AdapterOptions, Capacity, FeedForward, LatentMoe, Linear, Moe, MoeLora, RoutedOutput, Routing,
    SharedExpert,
};
use rankmix::ops::DropPolicy;
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType, Value};

use crate::case::{floats, floats_in};
use crate::devices;
use crate::metrics::relative_errors;

const TOKENS: usize = 45;
const HIDDEN: usize = 20;
const INTERMEDIATE: usize = 68;

fn expert() -> FeedForward {
    FeedForward::new(HIDDEN, INTERMEDIATE)
}

fn expect(found: bool, message: impl Into<String>) -> Result<(), Failed> {
    if found {
        Ok(())
    } else {
        Err(message.into().into())
    }
}

/// Parameters of a layer by their names.
type Weights = HashMap<String, Tensor>;

/// Random ones; the logits far apart.
fn weights(build: &dyn Fn(&mut Graph, Value) -> Result<RoutedOutput>) -> Result<Weights> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
    build(&mut graph, x)?;
    let parameters = graph.parameters().iter().enumerate();
    let weights = parameters.map(|(seed, spec)| {
        let unit = 1.7 / (*spec.ty.dims().last().unwrap_or(&1) as f64).sqrt();
        let spread = if spec.name.ends_with(".router") {
            2.0
        } else {
            unit
        };
        let tensor = floats_in(spec.ty.dims(), 500 + seed as u64, -spread, spread);
        (spec.name.clone(), tensor)
    });
    Ok(weights.collect())
}

/// The output, and the gradients of x and of the parameters in the order of their names.
fn run(
    device: &Device,
    build: &dyn Fn(&mut Graph, Value) -> Result<RoutedOutput>,
    weights: &Weights,
) -> Result<Vec<Tensor>> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
    let routed = build(&mut graph, x)?;
    let upstream = graph.constant(floats(&[TOKENS, HIDDEN], 501))?;
    let store = ParameterStore::new(device);
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort();
    let mut wanted = vec![x];
    for name in names {
        store.insert(name, &weights[name])?;
        wanted.push(graph.named(name)?);
    }
    let mut results = graph.gradients_from(&[(routed.output, upstream)], &wanted)?;
    results.insert(0, routed.output);
    for &value in &results {
        graph.output(value)?;
    }
    let mut session = graph.compile(&store)?;
    session.poison()?;
    session.write(x, &floats(&[TOKENS, HIDDEN], 502))?;
    session.run_reading(&results)
}

fn close(got: &Tensor, want: &Tensor) -> Result<(), Failed> {
    let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
    expect(
        norm <= 1e-5 && largest <= 1e-4,
        format!("{norm:.2e} in norm, {largest:.2e} of the largest"),
    )
}

/// B a reflection for each group and A = W B^T: the latent layer is the layer it came from, x's gradient included.
fn latent_at_full_rank_is_its_moe(device: &Device) -> Result<(), Failed> {
    let routing = Routing::new(6, 3);
    for factored_down in [false, true] {
        let build = |graph: &mut Graph, x| Moe::new("layer", expert(), routing)?.forward(graph, x);
        let source = weights(&build)?;
        let want = run(device, &build, &source)?;

        // I - 2 v v^T / <v, v>, symmetric and orthogonal.
        let reflection = |group: usize| -> Vec<f64> {
            let v = floats(&[HIDDEN], 510 + group as u64).to_f64();
            let length: f64 = v.iter().map(|v| v * v).sum();
            let element =
                |i: usize, j: usize| f64::from(u8::from(i == j)) - 2.0 * v[i] * v[j] / length;
            (0..HIDDEN * HIDDEN)
                .map(|at| element(at / HIDDEN, at % HIDDEN))
                .collect()
        };
        let groups = 2;
        let bases: Vec<Vec<f64>> = (0..groups).map(reflection).collect();
        let stacked = Tensor::f64([groups, HIDDEN, HIDDEN], bases.concat())?;
        let mut latent = Weights::new();
        latent.insert("layer.router".to_owned(), source["layer.router"].clone());
        for part in ["gate", "up"] {
            // A_i = W_i B, rows of W times the reflection of the expert's group.
            let w = source[&format!("layer.{part}")].to_f64();
            let a = w.chunks(HIDDEN).enumerate().flat_map(|(row, w)| {
                let base = &bases[row / INTERMEDIATE / 3];
                (0..HIDDEN).map(move |j| (0..HIDDEN).map(|i| w[i] * base[i * HIDDEN + j]).sum())
            });
            let a = Tensor::f64([6, INTERMEDIATE, HIDDEN], a.collect())?;
            latent.insert(format!("layer.{part}_expert"), a);
            latent.insert(format!("layer.{part}_latent"), stacked.clone());
        }
        let down = &source["layer.down"];
        if factored_down {
            // W_i = B (B W_i)
            let w = down.to_f64();
            let a = (0..6 * HIDDEN * INTERMEDIATE).map(|at| {
                let (e, i, j) = (
                    at / (HIDDEN * INTERMEDIATE),
                    at / INTERMEDIATE % HIDDEN,
                    at % INTERMEDIATE,
                );
                let column = |r: usize| w[(e * HIDDEN + r) * INTERMEDIATE + j];
                (0..HIDDEN)
                    .map(|r| bases[e / 3][i * HIDDEN + r] * column(r))
                    .sum()
            });
            let a = Tensor::f64([6, HIDDEN, INTERMEDIATE], a.collect())?;
            latent.insert("layer.down_expert".to_owned(), a);
            latent.insert("layer.down_latent".to_owned(), stacked);
        } else {
            latent.insert("layer.down".to_owned(), down.clone());
        }
        let build = |graph: &mut Graph, x| {
            let mut layer = LatentMoe::new("layer", expert(), HIDDEN, groups, routing)?;
            layer.factored_down = factored_down;
            layer.forward(graph, x)
        };
        let got = run(device, &build, &latent)?;
        close(&got[0], &want[0])?;
        close(&got[1], &want[1])?;
    }
    Ok(())
}

/// Rows of `count` blocks in another order.
fn permuted(tensor: &Tensor, permutation: &[usize]) -> Result<Tensor> {
    let values = tensor.to_f64();
    let block = values.len() / permutation.len();
    let blocks = permutation
        .iter()
        .flat_map(|&from| &values[from * block..(from + 1) * block]);
    Tensor::f64(tensor.shape(), blocks.copied().collect())
}

/// The experts and their router's rows in another order: the same output bit for bit, since a token's slots keep their order.
fn the_order_of_experts_does_not_matter(device: &Device) -> Result<(), Failed> {
    let routing = Routing::new(7, 3);
    let build = |graph: &mut Graph, x| Moe::new("layer", expert(), routing)?.forward(graph, x);
    let source = weights(&build)?;
    let permutation = [3, 0, 6, 1, 5, 2, 4];
    let mut other = Weights::new();
    for (name, tensor) in &source {
        other.insert(name.clone(), permuted(tensor, &permutation)?);
    }
    let (want, got) = (run(device, &build, &source)?, run(device, &build, &other)?);
    expect(got[0] == want[0], "the output is not equal bit for bit")?;
    close(&got[1], &want[1])?;
    // Parameters are in the order of their names: down, gate, router, up.
    for (got, want) in got[2..].iter().zip(&want[2..]) {
        close(got, &permuted(want, &permutation)?)?;
    }
    // Of latent experts, groups can be permuted, and experts inside them.
    let build = |graph: &mut Graph, x| {
        LatentMoe::new("layer", expert(), 12, 2, Routing::new(6, 3))?.forward(graph, x)
    };
    let source = weights(&build)?;
    let mut other = Weights::new();
    for (name, tensor) in &source {
        let order: &[usize] = if name.ends_with("_latent") {
            &[1, 0]
        } else {
            &[5, 3, 4, 0, 2, 1]
        };
        other.insert(name.clone(), permuted(tensor, order)?);
    }
    let (want, got) = (run(device, &build, &source)?, run(device, &build, &other)?);
    expect(
        got[0] == want[0],
        "the latent output is not equal bit for bit",
    )
}

/// A capacity that drops nothing changes nothing, gradients included.
fn a_large_capacity_is_none(device: &Device) -> Result<(), Failed> {
    let dropless = Routing::new(5, 2);
    for drop in [DropPolicy::Position, DropPolicy::Gate] {
        let capacity = Some(Capacity { factor: 2.5, drop });
        let roomy = Routing {
            capacity,
            ..dropless
        };
        for kind in ["moe", "latent", "lora"] {
            let build = |routing: Routing| {
                move |graph: &mut Graph, x| match kind {
                    "moe" => Moe::new("layer", expert(), routing)?.forward(graph, x),
                    "latent" => {
                        LatentMoe::new("layer", expert(), 12, 5, routing)?.forward(graph, x)
                    }
                    _ => {
                        let base = Linear::new("layer", HIDDEN, HIDDEN);
                        MoeLora::new(base, AdapterOptions::new(4, 8.0), routing)?.forward(graph, x)
                    }
                }
            };
            let (without, with) = (build(dropless), build(roomy));
            let weights = weights(&without)?;
            let (without, with) = (
                run(device, &without, &weights)?,
                run(device, &with, &weights)?,
            );
            expect(
                with == without,
                format!("{kind}, {drop:?}: not equal bit for bit"),
            )?;
        }
    }
    Ok(())
}

/// Which pairs are dropped, the counts of it, and what a token gets whose choices were all dropped.
fn drops_are_counted(device: &Device) -> Result<(), Failed> {
    let (experts, top_k) = (4, 1);
    for drop in [DropPolicy::Position, DropPolicy::Gate] {
        for shared in [
            None,
            Some(SharedExpert {
                intermediate: 9,
                sigmoid_gate: true,
            }),
        ] {
            let routing = Routing {
                renormalize: false,
                capacity: Some(Capacity { factor: 0.6, drop }),
                ..Routing::new(experts, top_k)
            };
            let layer = |routing| -> Result<Moe> {
                let mut layer = Moe::new("layer", expert(), routing)?;
                layer.shared = shared;
                Ok(layer)
            };
            let build = |graph: &mut Graph, x| layer(routing)?.forward(graph, x);
            let mut graph = Graph::new();
            let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
            let routed = layer(routing)?.forward(&mut graph, x)?;
            let free = layer(Routing {
                capacity: None,
                ..routing
            })?
            .forward(&mut graph, x)?;
            let metrics = routed.metrics(&mut graph)?;
            let values = [
                routed.output,
                routed.routed.experts(),
                routed.routed.gates,
                free.output,
                free.routed.experts(),
                free.routed.gates,
                metrics.counts,
                metrics.dropped,
            ];
            for &value in &values {
                graph.output(value)?;
            }
            let store = ParameterStore::new(device);
            for (name, tensor) in weights(&build)? {
                store.insert(&name, &tensor)?;
            }
            let mut session = graph.compile(&store)?;
            session.poison()?;
            session.write(x, &floats(&[TOKENS, HIDDEN], 530))?;
            let got = session.run_reading(&values)?;
            let ints = |index: usize| got[index].as_i32().unwrap_or_default();
            let gates = got[5].to_f32();
            // By hand: ceil(0.6 * 45 / 4) = 7 pairs an expert.
            let limit = 7;
            expect(
                routing.expert_capacity(TOKENS) == Some(limit),
                "the capacity is not 7",
            )?;
            let (mut kept, mut dropped) = (vec![false; TOKENS], vec![0; experts]);
            for (expert, dropped) in dropped.iter_mut().enumerate() {
                let mut pairs: Vec<usize> = (0..TOKENS)
                    .filter(|&pair| ints(4)[pair] == expert as i32)
                    .collect();
                expect(ints(6)[expert] == pairs.len() as i32, "a count is wrong")?;
                *dropped = pairs.len().saturating_sub(limit) as i32;
                if drop == DropPolicy::Gate {
                    pairs.sort_by(|&a, &b| gates[b].total_cmp(&gates[a]));
                }
                for &pair in pairs.iter().take(limit) {
                    kept[pair] = true;
                }
            }
            expect(
                ints(7) == dropped,
                format!("dropped {:?}, not {dropped:?}", ints(7)),
            )?;
            expect(
                kept.contains(&false),
                "nothing was dropped: the test shows nothing",
            )?;
            let (output, whole) = (got[0].to_f32(), got[3].to_f32());
            for token in 0..TOKENS {
                let row = token * HIDDEN..(token + 1) * HIDDEN;
                let is_none = ints(1)[token] == experts as i32;
                expect(
                    is_none != kept[token],
                    format!("{drop:?}: token {token} is wrong"),
                )?;
                let gate = got[2].to_f32()[token];
                if kept[token] {
                    expect(
                        gate.to_bits() == gates[token].to_bits(),
                        "a gate that stays changed",
                    )?;
                    // Not bit for bit on the CPU, whose matrix products depend on how many rows there are.
                    let both = output[row.clone()].iter().zip(&whole[row]);
                    let furthest = both.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    expect(furthest < 1e-5, "a token that stays changed")?;
                } else {
                    expect(gate == 0.0, "a dropped gate is not 0")?;
                    let zero = output[row.clone()].iter().all(|&y| y == 0.0);
                    expect(
                        zero == shared.is_none(),
                        "a dropped token is not what it should be",
                    )?;
                    expect(
                        output[row.clone()] != whole[row],
                        "dropping changed nothing",
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// A frozen layer has no gradients, and a layer has as many parameters as it says.
fn parameters_are_counted() -> Result<(), Failed> {
    for gated in [true, false] {
        for (selection_bias, sigmoid_gate) in [(true, true), (false, false)] {
            let expert = FeedForward { gated, ..expert() };
            let routing = Routing {
                selection_bias,
                ..Routing::new(6, 2)
            };
            let shared = SharedExpert {
                intermediate: 11,
                sigmoid_gate,
            };
            let moe = Moe::new("layer", expert, routing)?.with_shared(shared)?;
            let latent = LatentMoe::new("layer", expert, 7, 3, routing)?.with_shared(shared)?;
            let factored = latent.clone().with_factored_down();
            let count = |forward: &dyn Fn(&mut Graph, Value) -> Result<RoutedOutput>| -> Result<_> {
                let mut graph = Graph::new();
                let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
                forward(&mut graph, x)?;
                let elements: usize = graph.parameters().iter().map(|p| p.ty.elements()).sum();
                Ok((elements as u64, graph.trainable_elements() as u64))
            };
            let bias = if selection_bias { 6 } else { 0 };
            for ((found, trained), counted) in [
                (count(&|g, x| moe.forward(g, x))?, moe.parameters()),
                (count(&|g, x| latent.forward(g, x))?, latent.parameters()),
                (
                    count(&|g, x| factored.forward(g, x))?,
                    factored.parameters(),
                ),
            ] {
                expect(
                    found == counted,
                    format!("{found} parameters, counted {counted}"),
                )?;
                expect(trained == counted - bias, "not all parameters are trained")?;
            }
            let frozen = moe.clone().frozen();
            let (_, trained) = count(&|g, x| frozen.forward(g, x))?;
            expect(trained == 0, "a frozen layer is trained")?;
        }
    }
    Ok(())
}

/// The published reductions of expert weights, and the terms of the operation counts.
fn published_reductions_are_reproduced() -> Result<(), Failed> {
    for (model, experts, m, n, groups, reduction) in [
        ("DeepSeek-V2-Lite", 64, 1408, 2048, 8, 12.5),
        ("Qwen3-30B-A3B", 128, 768, 2048, 32, 25.0),
        ("Qwen3-235B-A22B", 128, 1536, 4096, 32, 25.0),
        ("DeepSeek-V3", 256, 2048, 7168, 64, 31.0),
        ("Kimi-K2", 384, 2048, 7168, 128, 25.4),
    ] {
        let (expert, routing) = (FeedForward::new(n, m), Routing::new(experts, 8));
        let source = Moe::new("layer", expert, routing)?;
        let latent = LatentMoe::new("layer", expert, m, groups, routing)?;
        let [e, m, n, g] = [experts, m, n, groups].map(|size| size as u64);
        let (before, after) = (source.expert_parameters(), latent.expert_parameters());
        expect(before == 3 * e * m * n, format!("{model}: {before}"))?;
        expect(
            after == e * m * n + 2 * e * m * m + 2 * g * m * n,
            format!("{model}: {after}"),
        )?;
        let found = 100.0 * (1.0 - after as f64 / before as f64);
        expect(
            (found - reduction).abs() < 0.05,
            format!("{model}: {found:.3} %, published {reduction} %"),
        )?;
        expect(
            source.expert_flops_per_token() == 6 * 8 * m * n,
            "the source's operations",
        )?;
        let latent_flops = |active: u64| 2 * 8 * m * n + 4 * 8 * m * m + 4 * active * m * n;
        for active in [1, 3, 8] {
            let found = latent.expert_flops_per_token(active);
            expect(
                found == latent_flops(active as u64),
                format!("{model}: {found} operations"),
            )?;
        }
        // With every chosen expert in a group of its own, and l = m, it costs more than the source.
        expect(
            latent_flops(8) > 6 * 8 * m * n,
            "eight active groups are cheaper",
        )?;
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    type Check = fn(&Device) -> Result<(), Failed>;
    let checks: [(&str, Check); 4] = [
        (
            "latent_at_full_rank_is_its_moe",
            latent_at_full_rank_is_its_moe,
        ),
        (
            "the_order_of_experts_does_not_matter",
            the_order_of_experts_does_not_matter,
        ),
        ("a_large_capacity_is_none", a_large_capacity_is_none),
        ("drops_are_counted", drops_are_counted),
    ];
    let mut trials: Vec<Trial> = checks
        .into_iter()
        .flat_map(|(name, check)| devices::trials(&format!("moe_facts::{name}"), check))
        .collect();
    trials.push(Trial::test(
        "moe_facts::parameters_are_counted",
        parameters_are_counted,
    ));
    trials.push(Trial::test(
        "moe_facts::published_reductions_are_reproduced",
        published_reductions_are_reproduced,
    ));
    trials
}
