//! A dense feed-forward split into experts.

use rankmix::convert::{
    DenseFeedForward, DenseGates, DenseOptions, DenseReport, normed_inputs, split_dense,
};
use rankmix::formats::MoeExperts;
use rankmix::layers::{FeedForward, Moe, Routing};
use rankmix::{Device, Error, Graph, ParameterStore, Tensor, TensorType};

use crate::random::{Random, in_threads};

const HIDDEN: usize = 24;
const NEURONS: usize = 48;

fn matrix(random: &mut Random, [rows, columns]: [usize; 2]) -> Tensor {
    let data = random
        .matrix(rows, columns)
        .iter()
        .map(|&x| x as f32)
        .collect();
    Tensor::f32([rows, columns], data).expect("the shape fits")
}

fn dense(seed: u64) -> DenseFeedForward {
    let mut random = Random::new(seed);
    DenseFeedForward {
        gate: matrix(&mut random, [NEURONS, HIDDEN]),
        up: matrix(&mut random, [NEURONS, HIDDEN]),
        down: matrix(&mut random, [HIDDEN, NEURONS]),
    }
}

/// Neurons in families: the gate rows of one point in one direction, so that a token of that direction needs them alone.
fn dense_of_families(seed: u64, families: usize) -> DenseFeedForward {
    let mut random = Random::new(seed);
    let centres = random.matrix(families, HIDDEN);
    let gate = (0..NEURONS)
        .flat_map(|neuron| {
            let family = (neuron * 5) % families;
            (0..HIDDEN).map(move |column| (family, column))
        })
        .map(|(family, column)| (centres[family * HIDDEN + column] + 0.1 * random.next()) as f32)
        .collect();
    DenseFeedForward {
        gate: Tensor::f32([NEURONS, HIDDEN], gate).expect("the shape fits"),
        ..dense(seed + 1)
    }
}

fn inputs(tokens: usize, seed: u64) -> Tensor {
    let norm = Tensor::f32(
        [HIDDEN],
        (0..HIDDEN).map(|i| 0.5 + i as f32 / 24.0).collect(),
    );
    normed_inputs(&norm.expect("the shape fits"), tokens, seed).expect("it is a vector")
}

fn options(experts: usize, top_k: usize, gates: DenseGates) -> DenseOptions {
    DenseOptions {
        experts,
        top_k,
        gates,
        seed: 3,
    }
}

fn split(dense: &DenseFeedForward, options: &DenseOptions) -> (MoeExperts, Tensor, DenseReport) {
    split_dense(dense, &inputs(400, 1), options).expect("it fits")
}

fn dense_output(dense: &DenseFeedForward, tokens: &Tensor) -> Vec<f64> {
    let (gate, up, down) = (dense.gate.to_f64(), dense.up.to_f64(), dense.down.to_f64());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut out = Vec::new();
    for x in tokens.to_f64().chunks(HIDDEN) {
        let inside: Vec<f64> = gate
            .chunks(HIDDEN)
            .zip(up.chunks(HIDDEN))
            .map(|(gate, up)| {
                let gate = dot(gate, x);
                gate / (1.0 + (-gate).exp()) * dot(up, x)
            })
            .collect();
        out.extend(down.chunks(NEURONS).map(|row| dot(row, &inside)));
    }
    out
}

fn moe_output(
    experts: &MoeExperts,
    router: &Tensor,
    routing: Routing,
    tokens: &Tensor,
) -> Vec<f64> {
    let [_, m, n] = experts.extents().expect("they fit");
    let run = || -> rankmix::Result<Vec<f64>> {
        let layer = Moe::new("moe", FeedForward::new(n, m), routing)?;
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32(tokens.shape().dims().to_vec()))?;
        let output = layer.forward(&mut graph, x)?.output;
        graph.output(output)?;
        let store = ParameterStore::new(&Device::cpu());
        store.initialize(&graph, 1)?;
        for (name, tensor) in [
            ("moe.router", router),
            ("moe.gate", &experts.gate),
            ("moe.up", &experts.up),
            ("moe.down", &experts.down),
        ] {
            store.insert(name, tensor)?;
        }
        let mut session = graph.compile(&store)?;
        session.set("x", tokens)?;
        Ok(session.run_reading(&[output])?[0].to_f64())
    };
    run().expect("it runs")
}

fn routing(options: &DenseOptions) -> Routing {
    Routing {
        renormalize: options.gates == DenseGates::Chosen,
        ..Routing::new(options.experts, options.top_k)
    }
}

fn relative(found: &[f64], expected: &[f64]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / square(&mut expected.iter().copied())).sqrt()
}

#[test]
fn all_experts_together_are_the_dense_layer() {
    let source = dense(1);
    let tokens = inputs(30, 77);
    let expected = dense_output(&source, &tokens);
    for experts in [1, 4, 6, 16] {
        for gates in [DenseGates::Chosen, DenseGates::All] {
            let options = options(experts, experts, gates);
            let (moe, router, _) = split(&source, &options);
            let found = moe_output(&moe, &router, routing(&options), &tokens);
            let error = relative(&found, &expected);
            assert!(error < 2e-6, "{experts} experts, {gates:?}: {error}");
        }
    }
}

#[test]
fn fewer_experts_give_what_the_report_says_they_keep() {
    let source = dense_of_families(5, 6);
    let tokens = inputs(400, 1);
    let expected = dense_output(&source, &tokens);
    for gates in [DenseGates::Chosen, DenseGates::All] {
        let options = options(6, 2, gates);
        let (moe, router, report) = split(&source, &options);
        let found = moe_output(&moe, &router, routing(&options), &tokens);
        // The last quarter of the tokens.
        let held_out = 300 * HIDDEN;
        let kept = 1.0 - relative(&found[held_out..], &expected[held_out..]).powi(2);
        let reported = report.kept_output.iter().find(|kept| kept.top_k == 2);
        let reported = reported.expect("it is what was asked for");
        assert!(
            (kept - reported.router).abs() < 1e-4,
            "{kept} is not {reported:?}"
        );
        let all = report.kept_output.last().expect("there are experts");
        assert_eq!(all.top_k, 6);
        assert!((all.router - 1.0).abs() < 1e-9 && (all.random - 1.0).abs() < 1e-9);
        assert!(reported.router > reported.random + 0.1, "{reported:?}");
        assert!(reported.largest >= reported.router, "{reported:?}");
    }
}

#[test]
fn clusters_are_of_one_size_and_find_families_of_neurons() {
    let (_, _, report) = split(&dense_of_families(9, 6), &options(6, 2, DenseGates::Chosen));
    let mut sizes = [0; 6];
    for &expert in &report.neuron_to_expert {
        sizes[expert] += 1;
    }
    assert_eq!(sizes, [8; 6]);
    for a in 0..NEURONS {
        for b in 0..NEURONS {
            assert_eq!(
                report.neuron_to_expert[a] == report.neuron_to_expert[b],
                (a * 5) % 6 == (b * 5) % 6,
                "neurons {a} and {b}"
            );
        }
    }
    assert_eq!((report.tokens, report.held_out_tokens), (300, 100));
}

#[test]
fn neurons_keep_their_three_weights() {
    let source = dense(2);
    let options = options(4, 2, DenseGates::All);
    let (moe, _, report) = split(&source, &options);
    let (gate, down) = (source.gate.to_f32(), source.down.to_f32());
    let (moe_gate, moe_down) = (moe.gate.to_f32(), moe.down.to_f32());
    let size = NEURONS / 4;
    let mut next = [0; 4];
    for (neuron, &expert) in report.neuron_to_expert.iter().enumerate() {
        let place = next[expert];
        next[expert] += 1;
        assert_eq!(
            moe_gate[(expert * size + place) * HIDDEN..][..HIDDEN],
            gate[neuron * HIDDEN..][..HIDDEN]
        );
        for row in 0..HIDDEN {
            let found = moe_down[(expert * HIDDEN + row) * size + place];
            assert_eq!(found, 4.0 * down[row * NEURONS + neuron]);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let options = options(6, 2, DenseGates::Chosen);
    let (dense, tokens) = (dense(3), inputs(1100, 1));
    let with = |threads| {
        in_threads(threads, || {
            split_dense(&dense, &tokens, &options).expect("it fits")
        })
    };
    let (one, three) = (with(1), with(3));
    assert_eq!(one, three);
    assert_eq!(with(3), three);
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let refused = |dense: &DenseFeedForward, tokens: &Tensor, experts, top_k| {
        split_dense(dense, tokens, &options(experts, top_k, DenseGates::All))
            .expect_err("it does not fit")
    };
    let (source, tokens) = (dense(1), inputs(8, 1));
    for (experts, top_k, words) in [
        (5, 2, ["experts = 5", "48 neurons"]),
        (0, 1, ["experts = 0", "48 neurons"]),
        (4, 5, ["top_k = 5", "4 experts"]),
        (4, 0, ["top_k = 0", "4 experts"]),
    ] {
        let message = refused(&source, &tokens, experts, top_k).to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    let message = refused(&source, &inputs(3, 1), 4, 2).to_string();
    assert!(message.contains("tokens = 3"), "{message}");
    let narrow = matrix(&mut Random::new(1), [8, 10]);
    let message = refused(&source, &narrow, 4, 2).to_string();
    assert!(
        message.contains("[8, 10]") && message.contains("24"),
        "{message}"
    );
    let mut wrong = dense(1);
    wrong.down = matrix(&mut Random::new(1), [NEURONS, HIDDEN]);
    let message = refused(&wrong, &tokens, 4, 2).to_string();
    assert!(
        message.contains("down") && message.contains("[24, 48]"),
        "{message}"
    );
    let mut wrong = dense(1);
    let mut data = wrong.up.to_f32();
    data[7] = f32::NAN;
    wrong.up = Tensor::f32([NEURONS, HIDDEN], data).expect("the shape fits");
    let error = refused(&wrong, &tokens, 4, 2);
    assert!(
        matches!(&error, Error::NotFinite { value, element: 7 } if value.contains("up")),
        "{error:?}"
    );
}
