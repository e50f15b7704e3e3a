//! Routing options, and what feed-forward experts are made of.

use rankmix::ops::{Activation, BalanceForm, DropPolicy, Layout, Projection, Route, Routed, Score};
use rankmix::{Graph, Result, Tensor, Value};

use crate::case::{Case, floats, floats_in, ints};
use crate::popularity::{Popularity, choose};

/// Experts for tokens of which some pairs belong to none.
fn choose_with_none(popularity: Popularity, tokens: usize, top_k: usize, experts: usize) -> Tensor {
    let chosen = choose(popularity, tokens, top_k, experts);
    let dropped = ints(&[tokens * top_k], 200, 4)
        .as_i32()
        .unwrap_or_default()
        .to_vec();
    let chosen = chosen.as_i32().unwrap_or_default().iter().zip(&dropped);
    let chosen = chosen
        .map(|(&expert, &dropped)| if dropped == 0 { experts as i32 } else { expert })
        .collect();
    Tensor::i32([tokens, top_k], chosen).expect("top_k experts a token")
}

fn activations(cases: &mut Vec<Case>) {
    cases.push(Case::new(
        "sigmoid",
        vec![floats_in(&[3, 7], 201, -4.0, 4.0)],
        |g, v| Ok(vec![g.sigmoid(v[0])?]),
    ));
    let far = floats_in(&[133], 202, -1e4, 1e4);
    cases.push(
        Case::new("sigmoid_extreme", vec![far], |g, v| {
            let y = g.sigmoid(v[0])?;
            let dx = g.gradients_from(&[(y, v[0])], &[v[0]])?;
            Ok(vec![y, dx[0]])
        })
        .forward_only(),
    );
    for activation in Activation::ALL {
        let pair = vec![floats_in(&[3, 7], 203, -4.0, 4.0), floats(&[3, 7], 204)];
        cases.push(Case::new(
            format!("activate_{activation:?}"),
            pair[..1].to_vec(),
            move |g, v| Ok(vec![g.activate(activation, v[0], None)?]),
        ));
        cases.push(Case::new(
            format!("activate_gated_{activation:?}"),
            pair,
            move |g, v| Ok(vec![g.activate(activation, v[0], Some(v[1]))?]),
        ));
        // Near 0 and in the tails, each by itself, so that no large element hides the error of a small one.
        for (low, high) in [
            (-0.2, 0.2),
            (-5.5, -3.0),
            (-3.0, -1.0),
            (1.0, 9.0),
            (-1e4, 1e4),
        ] {
            let x = floats_in(&[257], 205, low, high);
            let upstream = floats(&[257], 206);
            let name = format!("activate_{activation:?}_{low}_{high}");
            let build = move |g: &mut Graph, v: &[Value]| {
                let y = g.activate(activation, v[0], None)?;
                let dx = g.gradients_from(&[(y, v[1])], &v[..1])?;
                Ok(vec![y, dx[0]])
            };
            cases.push(Case::new(name, vec![x, upstream], build).forward_only());
        }
    }
}

/// Both projections of experts, with and without a map to latents, with and without pairs of no expert.
fn gated_experts(
    cases: &mut Vec<Case>,
    [tokens, top_k, experts, groups, out, input]: [usize; 6],
    popularity: Popularity,
    activation: Activation,
    with_gradients: bool,
) {
    for (gated, mapped) in [(true, false), (true, true), (false, false), (false, true)] {
        let chosen = if mapped {
            choose_with_none(popularity, tokens, top_k, experts)
        } else {
            choose(popularity, tokens, top_k, experts)
        };
        let rows = if mapped {
            tokens * top_k.min(groups)
        } else {
            tokens
        };
        let x = |seed| floats(&[rows, input], seed);
        let weight = |seed| floats(&[experts, out, input], seed);
        let inputs = vec![chosen, x(210), weight(211), x(212), weight(213)];
        let name = format!(
            "gated_experts_{gated}_{mapped}_{tokens}_{top_k}_{experts}_{groups}_{out}_{input}_{popularity:?}_{activation:?}"
        );
        let run = move |g: &mut Graph, v: &[Value]| -> Result<Value> {
            let (segments, active) = if mapped {
                let segments = g.segments_with_none(v[0], experts)?;
                (segments, Some(g.active_groups(segments, experts, groups)?))
            } else {
                (g.segments(v[0], experts)?, None)
            };
            // Where there is no map, gate and up read the same rows.
            let up_x = if mapped { v[3] } else { v[1] };
            let gate = Projection {
                x: v[1],
                weight: v[2],
            };
            let up = gated.then_some(Projection {
                x: up_x,
                weight: v[4],
            });
            g.gated_experts(activation, gate, up, segments, active.as_ref())
        };
        if with_gradients {
            let build = move |g: &mut Graph, v: &[Value]| {
                let h = run(g, v)?;
                // Every input has a path to the loss, so that its gradient exists.
                let mut rest = vec![];
                for &value in &v[1..] {
                    rest.push(g.sum_all(value)?);
                }
                rest.push(h);
                Ok(rest)
            };
            cases.push(Case::new(name, inputs, build));
        } else {
            let mut inputs = inputs;
            inputs.push(floats(&[tokens * top_k, out], 214));
            let build = move |g: &mut Graph, v: &[Value]| {
                let h = run(g, v)?;
                let mut wanted = vec![v[1], v[2]];
                if gated {
                    wanted.push(v[4]);
                }
                let mut results = g.gradients_from(&[(h, v[5])], &wanted)?;
                results.push(h);
                Ok(results)
            };
            cases.push(Case::new(name, inputs, build).forward_only());
        }
    }
}

/// inputs: experts, gates, u, down latents: the factored way down.
fn factored_down(g: &mut Graph, v: &[Value], experts: usize, groups: usize) -> Result<Vec<Value>> {
    let segments = g.segments_with_none(v[0], experts)?;
    let active = g.active_groups(segments, experts, groups)?;
    let combined = g.combine(v[2], v[1], &active)?;
    let y = g.expand_ungated(combined, v[3], Layout::OutIn, active.segments)?;
    Ok(vec![active.segments.experts(), active.rows(), combined, y])
}

fn groups(cases: &mut Vec<Case>) {
    for (tokens, top_k, experts, groups, latent, out) in [
        (1, 1, 1, 1, 1, 1),
        (3, 2, 4, 2, 3, 5),
        (4, 3, 6, 6, 4, 2),
        (2, 4, 4, 1, 5, 3),
        (133, 8, 64, 16, 20, 33),
        (70, 3, 12, 4, 70, 65),
    ] {
        let inputs = vec![
            choose_with_none(Popularity::Zipf, tokens, top_k, experts),
            floats_in(&[tokens, top_k], 220, 0.1, 1.0),
            floats(&[tokens * top_k, latent], 221),
            floats(&[groups, out, latent], 222),
        ];
        let name = format!("factored_down_{tokens}_{top_k}_{experts}_{groups}_{latent}_{out}");
        if tokens <= 4 {
            cases.push(Case::new(name, inputs, move |g, v| {
                factored_down(g, v, experts, groups)
            }));
        } else {
            let mut inputs = inputs;
            inputs.push(floats(&[tokens, out], 223));
            let build = move |g: &mut Graph, v: &[Value]| {
                let mut results = factored_down(g, v, experts, groups)?;
                let y = results[3];
                results.extend(g.gradients_from(&[(y, v[4])], &v[1..4])?);
                Ok(results)
            };
            cases.push(Case::new(name, inputs, build).forward_only());
        }
    }
}

/// The grouped products on pairs of which some belong to no expert, and the wide form of expand.
fn products(cases: &mut Vec<Case>) {
    for layout in [Layout::OutIn, Layout::InOut] {
        for (tokens, top_k, experts, out, input) in [
            (5, 2, 4, 3, 6),
            (3, 1, 2, 4, 4),
            (17, 2, 3, 2, 66),
            (133, 3, 7, 20, 132),
            (40, 8, 64, 33, 67),
        ] {
            let dims = if layout == Layout::OutIn {
                [experts, out, input]
            } else {
                [experts, input, out]
            };
            for popularity in [Popularity::Zipf, Popularity::Skewed] {
                let chosen = choose_with_none(popularity, tokens, top_k, experts);
                let name = format!(
                    "none_{layout:?}_{tokens}_{top_k}_{experts}_{out}_{input}_{popularity:?}"
                );
                let small = tokens <= 5;
                let inputs = vec![
                    chosen.clone(),
                    floats(&[tokens, input], 230),
                    floats(&dims, 231),
                ];
                let case = Case::new(format!("shrink_{name}"), inputs, move |g, v| {
                    let segments = g.segments_with_none(v[0], experts)?;
                    let z = g.shrink(v[1], v[2], layout, segments)?;
                    Ok(vec![z])
                });
                cases.push(if small { case } else { case.forward_only() });
                let inputs = vec![
                    chosen,
                    floats_in(&[tokens, top_k], 232, 0.1, 1.0),
                    floats(&[tokens * top_k, input], 233),
                    floats(&dims, 234),
                    floats(&[tokens, out], 235),
                ];
                let build = move |g: &mut Graph, v: &[Value]| {
                    let segments = g.segments_with_none(v[0], experts)?;
                    let routed = Routed {
                        gates: v[1],
                        segments,
                    };
                    let base = g.square(v[4])?;
                    Ok(vec![g.expand(
                        v[2],
                        v[3],
                        layout,
                        routed,
                        1.75,
                        Some(base),
                    )?])
                };
                let case = Case::new(format!("expand_{name}"), inputs, build);
                cases.push(if small { case } else { case.forward_only() });
            }
        }
        // Wide and whole: the gradients of the wide form, and it without pairs of no expert.
        let (tokens, top_k, experts, out, input) = (20, 2, 3, 2, 65);
        let dims = if layout == Layout::OutIn {
            [experts, out, input]
        } else {
            [experts, input, out]
        };
        let inputs = vec![
            choose(Popularity::Uniform, tokens, top_k, experts),
            floats_in(&[tokens, top_k], 236, 0.1, 1.0),
            floats(&[tokens * top_k, input], 237),
            floats(&dims, 238),
        ];
        cases.push(
            Case::new(format!("expand_wide_{layout:?}"), inputs, move |g, v| {
                let segments = g.segments(v[0], experts)?;
                let routed = Routed {
                    gates: v[1],
                    segments,
                };
                let y = g.expand(v[2], v[3], layout, routed, 0.5, None)?;
                let mut results = g.gradients_from(&[(y, y)], &v[1..4])?;
                results.push(y);
                Ok(results)
            })
            .forward_only(),
        );
    }
}

fn all_of(routed: Routed) -> [Value; 4] {
    [
        routed.gates,
        routed.experts(),
        routed.segments.order(),
        routed.segments.offsets(),
    ]
}

fn routes(cases: &mut Vec<Case>) {
    for score in [Score::Softmax, Score::Sigmoid] {
        for renormalize in [true, false] {
            for biased in [true, false] {
                let options = format!("{score:?}_{renormalize}_{biased}");
                let route = move |top_k| Route {
                    top_k,
                    renormalize,
                    score,
                    scale: 2.5,
                };
                let inputs = |tokens: usize, experts: usize, spread: f64| {
                    vec![
                        floats_in(&[tokens, experts], 240, -spread, spread),
                        floats_in(&[experts], 241, -1.0, 1.0),
                    ]
                };
                let run = move |g: &mut Graph, v: &[Value], top_k| {
                    g.route_with(v[0], biased.then_some(v[1]), route(top_k))
                };
                for (tokens, experts, top_k) in [(1, 1, 1), (3, 5, 2), (4, 3, 3), (2, 6, 1)] {
                    let name = format!("route_{options}_{tokens}_{experts}_{top_k}");
                    let inputs = inputs(tokens, experts, 3.0);
                    cases.push(Case::new(name, inputs, move |g, v| {
                        // The bias has a gradient only through its sum.
                        let sum = g.sum_all(v[1])?;
                        let routed = run(g, v, top_k)?;
                        Ok([&all_of(routed)[..], &[sum]].concat())
                    }));
                }
                // Logits that overflow an exponential, where nothing but zeros may vanish.
                for (tokens, experts, top_k, spread) in
                    [(133, 64, 8, 3.0), (70, 7, 7, 30.0), (40, 16, 3, 300.0)]
                {
                    let mut inputs = inputs(tokens, experts, spread);
                    inputs.push(floats(&[tokens, top_k], 242));
                    let name = format!("route_{options}_{tokens}_{experts}_{top_k}_{spread}");
                    let build = move |g: &mut Graph, v: &[Value]| {
                        let routed = run(g, v, top_k)?;
                        let gradient = g.gradients_from(&[(routed.gates, v[2])], &v[..1])?;
                        Ok([&all_of(routed)[..], &gradient].concat())
                    };
                    cases.push(Case::new(name, inputs, build).forward_only());
                }
            }
        }
    }
    // The bias turns the choice round: the largest logits are not chosen, and their exponentials would overflow.
    let logits = Tensor::f64([1, 4], vec![400.0, 200.0, 0.0, -100.0]).expect("4 logits");
    let bias = Tensor::f64([4], vec![-800.0, -400.0, 800.0, 800.0]).expect("4 biases");
    for renormalize in [true, false] {
        let name = format!("route_against_the_logits_{renormalize}");
        let inputs = vec![logits.clone(), bias.clone(), floats(&[1, 2], 243)];
        let build = move |g: &mut Graph, v: &[Value]| {
            let route = Route {
                renormalize,
                ..Route::new(2)
            };
            let routed = g.route_with(v[0], Some(v[1]), route)?;
            let gradient = g.gradients_from(&[(routed.gates, v[2])], &v[..1])?;
            Ok([&all_of(routed)[..], &gradient].concat())
        };
        cases.push(Case::new(name, inputs, build).forward_only());
    }
}

fn capacities(cases: &mut Vec<Case>) {
    for policy in [DropPolicy::Position, DropPolicy::Gate] {
        for popularity in Popularity::ALL {
            for (tokens, top_k, experts, capacity) in [
                (5, 2, 4, 2),
                (4, 1, 2, 1),
                (133, 3, 7, 40),
                (300, 4, 33, 1),
                (70, 8, 64, 100),
            ] {
                let inputs = vec![
                    choose(popularity, tokens, top_k, experts),
                    // Quarters: many equal gates.
                    quarters(&[tokens, top_k]),
                ];
                let name = format!(
                    "capacity_{policy:?}_{tokens}_{top_k}_{experts}_{capacity}_{popularity:?}"
                );
                let build = move |g: &mut Graph, v: &[Value]| {
                    let segments = g.segments(v[0], experts)?;
                    let routed = Routed {
                        gates: v[1],
                        segments,
                    };
                    let limited = g.limit_capacity(routed, experts, capacity, policy)?;
                    Ok(all_of(limited).to_vec())
                };
                let case = Case::new(name, inputs, build);
                // Differences cannot be taken where a step changes which of two equal gates is dropped.
                let smooth = tokens <= 5 && policy == DropPolicy::Position;
                cases.push(if smooth { case } else { case.forward_only() });
            }
        }
    }
    let inputs = vec![
        choose(Popularity::Skewed, 6, 2, 3),
        floats_in(&[6, 2], 251, 0.1, 1.0),
    ];
    cases.push(Case::new("capacity_by_gate", inputs, |g, v| {
        let segments = g.segments(v[0], 3)?;
        let routed = Routed {
            gates: v[1],
            segments,
        };
        let limited = g.limit_capacity(routed, 3, 3, DropPolicy::Gate)?;
        Ok(all_of(limited).to_vec())
    }));
}

/// 0.25, 0.5, 0.75 or 1 after a case's 1.25 x - 0.125.
fn quarters(dims: &[usize]) -> Tensor {
    let numbers = ints(dims, 250, 4);
    let values = numbers.as_i32().unwrap_or_default().iter();
    let values = values.map(|&i| (f64::from(i + 1) * 0.25 + 0.125) / 1.25);
    Tensor::f64(dims, values.collect()).expect("as many as there were integers")
}

fn router_numbers(cases: &mut Vec<Case>) {
    for (tokens, experts, top_k) in [(1, 1, 1), (5, 4, 2), (133, 64, 8), (1000, 7, 2)] {
        let inputs = vec![
            floats_in(&[tokens, experts], 260, -4.0, 4.0),
            choose(Popularity::Zipf, tokens, top_k, experts),
        ];
        let name = format!("router_metrics_{tokens}_{experts}_{top_k}");
        let build = move |g: &mut Graph, v: &[Value]| {
            let segments = g.segments(v[1], experts)?;
            let metrics = g.router_metrics(v[0], segments, Some(tokens * top_k / experts))?;
            let dropless = g.router_metrics(v[0], segments, None)?;
            Ok(vec![
                metrics.counts,
                metrics.dropped,
                metrics.entropy,
                dropless.dropped,
            ])
        };
        cases.push(Case::new(name, inputs.clone(), build).forward_only());
        let case = Case::new(
            format!("balance_loss_hugging_face_{tokens}_{experts}_{top_k}"),
            inputs,
            |g, v| {
                let balance = g.balance_loss_with(v[0], v[1], BalanceForm::HuggingFace)?;
                Ok(vec![balance.loss])
            },
        );
        cases.push(if tokens <= 5 {
            case
        } else {
            case.forward_only()
        });
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    activations(&mut cases);
    for (sizes, activation) in [
        ([1, 1, 1, 1, 1, 1], Activation::Silu),
        ([5, 2, 4, 2, 3, 6], Activation::Gelu),
        ([3, 3, 3, 3, 5, 4], Activation::GeluTanh),
        ([4, 2, 6, 3, 2, 3], Activation::Silu),
    ] {
        gated_experts(&mut cases, sizes, Popularity::Uniform, activation, true);
    }
    for popularity in Popularity::ALL {
        let sizes = [133, 3, 8, 4, 20, 36];
        gated_experts(&mut cases, sizes, popularity, Activation::Silu, false);
    }
    for (sizes, activation) in [
        ([7, 8, 64, 16, 65, 33], Activation::Gelu),
        ([70, 1, 3, 3, 70, 16], Activation::GeluTanh),
        ([40, 4, 4, 1, 67, 70], Activation::Silu),
    ] {
        gated_experts(&mut cases, sizes, Popularity::Uniform, activation, false);
    }
    groups(&mut cases);
    products(&mut cases);
    routes(&mut cases);
    capacities(&mut cases);
    router_numbers(&mut cases);
    cases
}
