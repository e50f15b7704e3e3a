//! Facts about routing, on every device.

use libtest_mimic::{Failed, Trial};
use rankmix::layers::{Capacity, FeedForward, Moe, Routing};
use rankmix::ops::{BalanceForm, DropPolicy, Route, Score};
use rankmix::{Device, Graph, Init, ParameterStore, Result, Tensor, TensorType};

use crate::case::{floats, floats_in};
use crate::devices;
use crate::metrics::relative_errors;

const TOKENS: usize = 45;
const HIDDEN: usize = 20;

fn expert() -> FeedForward {
    FeedForward::new(HIDDEN, 12)
}

fn expect(found: bool, message: impl Into<String>) -> Result<(), Failed> {
    if found {
        Ok(())
    } else {
        Err(message.into().into())
    }
}

/// Renormalised gates sum to the scale; softmax gates without that to less; sigmoid gates are what they are.
fn gates_sum_to_the_scale(device: &Device) -> Result<(), Failed> {
    let (experts, top_k, scale) = (9, 3, 2.5);
    let logits = floats_in(&[TOKENS, experts], 520, -6.0, 6.0);
    for score in [Score::Softmax, Score::Sigmoid] {
        for renormalize in [true, false] {
            let mut graph = Graph::new();
            let x = graph.input("logits", TensorType::f32([TOKENS, experts]))?;
            let route = Route {
                top_k,
                renormalize,
                score,
                scale,
            };
            let routed = graph.route_with(x, None, route)?;
            graph.output(routed.gates)?;
            graph.output(routed.experts())?;
            let mut session = graph.compile(&ParameterStore::new(device))?;
            session.write(x, &logits)?;
            let results = session.run_reading(&[routed.gates, routed.experts()])?;
            let (gates, chosen) = (results[0].to_f64(), results[1].as_i32().unwrap_or_default());
            let logits = logits.to_f64();
            for (token, (gates, chosen)) in
                gates.chunks(top_k).zip(chosen.chunks(top_k)).enumerate()
            {
                let score_of = |expert: usize| {
                    let logit = logits[token * experts + expert];
                    match score {
                        Score::Softmax => logit.exp(),
                        Score::Sigmoid => 1.0 / (1.0 + (-logit).exp()),
                    }
                };
                let chosen_sum: f64 = chosen.iter().map(|&e| score_of(e as usize)).sum();
                let divisor = match (renormalize, score) {
                    (true, _) => chosen_sum,
                    (false, Score::Softmax) => (0..experts).map(score_of).sum(),
                    (false, Score::Sigmoid) => 1.0,
                };
                let want = f64::from(scale) * chosen_sum / divisor;
                let sum: f64 = gates.iter().sum();
                expect(
                    (sum / want - 1.0).abs() < 1e-5,
                    format!(
                        "{score:?}, {renormalize}: token {token} has gates of {sum}, not {want}"
                    ),
                )?;
            }
        }
    }
    Ok(())
}

/// Three steps of the update, against the counts of each, and no gradient for the bias.
fn the_selection_bias_follows_the_counts(device: &Device) -> Result<(), Failed> {
    let (experts, rate) = (6, 0.25);
    for score in [Score::Softmax, Score::Sigmoid] {
        let routing = Routing {
            score,
            selection_bias: true,
            ..Routing::new(experts, 2)
        };
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
        let routed = Moe::new("layer", expert(), routing)?.forward(&mut graph, x)?;
        let metrics = routed.metrics(&mut graph)?;
        let updated = routed.update_selection_bias(&mut graph, rate)?;
        let square = graph.square(routed.output)?;
        let loss = graph.sum_all(square)?;
        let gradients = graph.backward(loss)?;
        let bias = graph.named("layer.router_bias")?;
        expect(gradients.of(bias).is_none(), "the bias has a gradient")?;
        let values = [
            metrics.counts,
            metrics.entropy,
            routed.routed.experts(),
            routed.logits,
        ];
        for &value in values.iter().chain([&updated]) {
            graph.output(value)?;
        }
        let store = ParameterStore::new(device);
        store.initialize(&graph, 3)?;
        store.insert(
            "layer.router",
            &floats_in(&[experts, HIDDEN], 540, -1.0, 1.0),
        )?;
        let mut session = graph.compile(&store)?;
        session.write(x, &floats(&[TOKENS, HIDDEN], 541))?;
        let mut bias = vec![0.0_f32; experts];
        for step in 0..3 {
            let got = session.run_reading(&values)?;
            let counts = got[0].as_i32().unwrap_or_default().to_vec();
            // The choice was made with the bias as it was before the step.
            let logits = got[3].to_f32();
            for (token, chosen) in got[2].as_i32().unwrap_or_default().chunks(2).enumerate() {
                let key = |expert: usize| {
                    let logit = logits[token * experts + expert];
                    bias[expert]
                        + match score {
                            Score::Softmax => logit,
                            Score::Sigmoid => 1.0 / (1.0 + (-logit).exp()),
                        }
                };
                let least = chosen
                    .iter()
                    .map(|&e| key(e as usize))
                    .fold(f32::MAX, f32::min);
                let others = (0..experts).filter(|&e| !chosen.contains(&(e as i32)));
                let most = others.map(key).fold(f32::MIN, f32::max);
                expect(
                    least > most - 1e-5,
                    format!("{score:?}, step {step}: token {token}"),
                )?;
            }
            let mean = (TOKENS * 2) as f64 / experts as f64;
            for (bias, &count) in bias.iter_mut().zip(&counts) {
                let difference = mean - f64::from(count);
                *bias += if difference == 0.0 {
                    0.0
                } else {
                    rate * difference.signum() as f32
                };
            }
            let stored = store.read("layer.router_bias")?.to_f32();
            expect(
                stored == bias,
                format!("{score:?}, step {step}: {stored:?}, not {bias:?}, after {counts:?}"),
            )?;
        }
        expect(bias.iter().any(|&b| b != 0.0), "the bias never moved")?;
    }
    Ok(())
}

/// Counts around a mean that is no whole number, and on one that is.
fn the_selection_bias_is_exact_around_the_mean(device: &Device) -> Result<(), Failed> {
    for (chosen, signs) in [
        (vec![0, 1, 1, 2, 2, 3, 3], [1.0, -1.0, -1.0, -1.0]),
        (vec![0, 0, 0, 1, 2], [-1.0, 1.0, 1.0, 1.0]),
        (vec![3, 1, 1, 0, 0, 0, 2, 2], [-1.0, 0.0, 0.0, 1.0]),
    ] {
        let mut graph = Graph::new();
        let pairs = graph.input("pairs", TensorType::i32([chosen.len()]))?;
        let segments = graph.segments(pairs, 4)?;
        let bias = graph.parameter("bias", [4], Init::Ones, false)?;
        graph.update_selection_bias(bias, segments, 0.5)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 0)?;
        let mut session = graph.compile(&store)?;
        session.write(pairs, &Tensor::i32([chosen.len()], chosen.clone())?)?;
        session.run()?;
        let found = store.read("bias")?.to_f32();
        let want = signs.map(|sign: f32| 1.0 + 0.5 * sign);
        expect(
            found == want,
            format!("{chosen:?}: {found:?}, not {want:?}"),
        )?;
    }
    Ok(())
}

/// Hugging Face's form is top_k times Switch's, in the loss and in its gradient, and counts what was chosen before dropping.
fn the_forms_of_the_balance_loss_agree(device: &Device) -> Result<(), Failed> {
    let top_k = 3;
    let run = |balance: BalanceForm, capacity: Option<Capacity>| -> Result<Vec<f64>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([TOKENS, HIDDEN]))?;
        let routing = Routing {
            balance,
            capacity,
            ..Routing::new(8, top_k)
        };
        let router = routing.route(&mut graph, "layer", x, true)?;
        let loss = router.auxiliary_loss(&mut graph, 1.0, 0.0)?;
        let mut values = graph.gradients(loss, &[x])?;
        values.push(loss);
        for &value in &values {
            graph.output(value)?;
        }
        let store = ParameterStore::new(device);
        store.insert("layer.router", &floats(&[8, HIDDEN], 550))?;
        let mut session = graph.compile(&store)?;
        session.write(x, &floats(&[TOKENS, HIDDEN], 551))?;
        let results = session.run_reading(&values)?;
        Ok(results.iter().flat_map(Tensor::to_f64).collect())
    };
    let switch = run(BalanceForm::Switch, None)?;
    let scaled: Vec<f64> = switch.iter().map(|x| x * top_k as f64).collect();
    let (norm, _) = relative_errors(&run(BalanceForm::HuggingFace, None)?, &scaled);
    expect(norm < 1e-6, format!("{norm:.2e} apart"))?;
    let tight = Capacity {
        factor: 0.25,
        drop: DropPolicy::Position,
    };
    expect(
        run(BalanceForm::Switch, Some(tight))? == switch,
        "dropping changed the balance loss",
    )
}

/// Masked experts have no part in the entropy, and a capacity beyond all counts drops nothing.
fn metrics_bear_the_extremes(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let lowest = f32::MIN;
    let logits = vec![lowest, 1.0, lowest, 1.0, lowest, lowest, lowest, lowest];
    let logits = graph.constant(Tensor::f32([2, 4], logits)?)?;
    let routed = graph.route(logits, 2, true)?;
    let metrics = graph.router_metrics(logits, routed.segments, Some(usize::MAX))?;
    for value in [metrics.dropped, metrics.entropy] {
        graph.output(value)?;
    }
    let mut session = graph.compile(&ParameterStore::new(device))?;
    let found = session.run_reading(&[metrics.dropped, metrics.entropy])?;
    let entropy = found[1].item().unwrap_or(f64::NAN);
    // ln 2 for two open experts, ln 4 where all are masked alike.
    let want = (2.0_f64.ln() + 4.0_f64.ln()) / 2.0;
    if found[0].to_f64() != [0.0; 4] || (entropy - want).abs() > 1e-6 {
        return Err(format!("dropped {:?}, entropy {entropy}, expected {want}", found[0]).into());
    }
    let routing = Routing {
        capacity: Some(Capacity {
            factor: f64::MAX,
            drop: DropPolicy::Gate,
        }),
        ..Routing::new(4, 2)
    };
    if routing.expert_capacity(16) == Some(32) {
        Ok(())
    } else {
        Err(format!("the capacity is {:?}", routing.expert_capacity(16)).into())
    }
}

pub fn trials() -> Vec<Trial> {
    type Check = fn(&Device) -> Result<(), Failed>;
    let checks: [(&str, Check); 5] = [
        ("metrics_bear_the_extremes", metrics_bear_the_extremes),
        ("gates_sum_to_the_scale", gates_sum_to_the_scale),
        (
            "the_selection_bias_follows_the_counts",
            the_selection_bias_follows_the_counts,
        ),
        (
            "the_selection_bias_is_exact_around_the_mean",
            the_selection_bias_is_exact_around_the_mean,
        ),
        (
            "the_forms_of_the_balance_loss_agree",
            the_forms_of_the_balance_loss_agree,
        ),
    ];
    checks
        .into_iter()
        .flat_map(|(name, check)| devices::trials(&format!("routing_facts::{name}"), check))
        .collect()
}
