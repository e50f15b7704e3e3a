//! LoRAs, and the experts of a mixture, as core experts of CoMoL.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rankmix::convert::{
    CoreReport, CoreRouter, DistillOptions, LoraOptions, loras_to_comol, moe_lora_to_comol,
};
use rankmix::formats::{LoraPair, MixtureAdapter, MixtureLayer, PeftAdapter, Target};
use rankmix::layers::{
    AdapterOptions, CoreRouting, GateInput, Linear, Lora, MoeLora, RotMole, Routing,
};
use rankmix::ops::{Rotation, Score};
use rankmix::{Device, Error, Graph, ParameterStore, Tensor, TensorType, Value};

use crate::random::in_threads;

const TOKENS: usize = 9;
const Q: &str = "model.layers.0.self_attn.q_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";
const WIDTHS: [(&str, usize, usize); 2] = [(Q, 40, 36), (DOWN, 56, 40)];

/// Numbers around 0 without structure: a stream of SplitMix64.
fn floats(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / 16_777_216.0 - 0.5
    };
    let data = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::f32(shape, data).expect("as many numbers as the shape has elements")
}

fn pair(rank: usize, d_in: usize, d_out: usize, scale: f64, seed: u64) -> LoraPair {
    LoraPair {
        target: Target::Linear,
        a: floats(&[rank, d_in], seed),
        b: floats(&[d_out, rank], seed + 1000),
        bias: None,
        scale,
    }
}

/// LoRAs of ranks 4, 2 and 5 and different scales; the second leaves one layer alone.
fn loras() -> Vec<(String, PeftAdapter)> {
    let settings = [(4, 2.0), (2, 0.3), (5, 1.0)];
    let named = settings.iter().enumerate().map(|(number, &(rank, scale))| {
        let pairs = WIDTHS.iter().filter(|(path, ..)| number != 1 || *path == Q);
        let pairs = pairs.map(|&(path, d_in, d_out)| {
            let seed = 10 * number as u64 + d_in as u64;
            (path.to_owned(), pair(rank, d_in, d_out, scale, seed))
        });
        let adapter = PeftAdapter::of_pairs(pairs.collect());
        (format!("lora {number}"), adapter)
    });
    named.collect()
}

fn convert(loras: &[(String, PeftAdapter)], options: &LoraOptions) -> (MixtureAdapter, CoreReport) {
    loras_to_comol(loras, options, |_| ()).expect("sound adapters")
}

/// The outputs of layers that read inputs of their own, on the CPU executor.
fn run(
    bases: &[Linear],
    forward: impl Fn(&mut Graph, &Linear, Value) -> Value,
    load: impl Fn(&ParameterStore),
) -> Vec<Tensor> {
    let mut graph = Graph::new();
    let mut outputs = Vec::new();
    for base in bases {
        let x = graph.input(&base.name, TensorType::f32([TOKENS, base.d_in]));
        let output = forward(&mut graph, base, x.expect("an input of its own"));
        graph.output(output).expect("a value of the graph");
        outputs.push(output);
    }
    let store = ParameterStore::new(&Device::cpu());
    load(&store);
    // What is left are the weights underneath, the same by the same names.
    store.initialize(&graph, 5).expect("memory");
    let mut session = graph.compile(&store).expect("a sound graph");
    for base in bases {
        let x = floats(&[TOKENS, base.d_in], 99);
        session.set(&base.name, &x).expect("an input");
    }
    session.run_reading(&outputs).expect("a run")
}

fn run_mixture(adapter: &MixtureAdapter) -> Vec<Tensor> {
    let bases: Vec<Linear> = adapter.layers.values().map(|l| l.base().clone()).collect();
    let forward = |graph: &mut Graph, base: &Linear, x: Value| match &adapter.layers[&base.name] {
        MixtureLayer::MoeLora(layer) => layer.forward(graph, x).expect("sound").output,
        MixtureLayer::RotMole(layer) => layer.forward(graph, x).expect("sound").output,
        MixtureLayer::CoMol(layer) => layer.forward(graph, x).expect("sound").output,
    };
    let load = |store: &ParameterStore| adapter.load_into(store).expect("its own parameters");
    run(&bases, forward, load)
}

/// What a LoRA's layers compute; those that it leaves alone are as they are underneath.
fn run_lora(adapter: &PeftAdapter) -> Vec<Tensor> {
    let bases: BTreeMap<&str, Linear> = WIDTHS
        .iter()
        .map(|&(path, d_in, d_out)| (path, Linear::new(path, d_in, d_out)))
        .collect();
    let bases: Vec<Linear> = bases.into_values().collect();
    let forward = |graph: &mut Graph, base: &Linear, x: Value| match adapter.pairs.get(&base.name) {
        Some(pair) => Lora::new(base.clone(), pair.options())
            .and_then(|lora| lora.forward(graph, x))
            .expect("sound"),
        None => base.forward(graph, x).expect("sound"),
    };
    run(&bases, forward, |store| {
        adapter.load_into(store).expect("its own pairs");
    })
}

fn largest_difference(one: &[Tensor], other: &[Tensor]) -> f32 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(other);
    let pairs = pairs.flat_map(|(one, other)| one.to_f32().into_iter().zip(other.to_f32()));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn loras_in_a_basis_that_is_wide_enough_lose_nothing() {
    let loras = loras();
    for (expert, (_, lora)) in loras.iter().enumerate() {
        let options = LoraOptions {
            router: CoreRouter::Expert(expert),
            ..LoraOptions::default()
        };
        let (comol, report) = convert(&loras, &options);
        let apart = largest_difference(&run_mixture(&comol), &run_lora(lora));
        assert!(apart < 1e-5, "expert {expert}: {apart} apart");
        assert!(report.lossless && report.largest_error < 1e-6, "{report:?}");
        let [down, q] = report.layers.as_slice() else {
            panic!("{} layers", report.layers.len());
        };
        assert_eq!(
            (q.summed_ranks, q.rank, q.independent_a, q.independent_b),
            (11, 11, 11, 11)
        );
        assert_eq!((down.summed_ranks, down.rank), (9, 9));
        assert_eq!(
            (down.experts[1].rank, down.experts[1].relative_error),
            (0, 0.0)
        );
        assert_eq!(down.elements_before, 9 * (56 + 40));
        assert_eq!(down.elements_after, 9 * (56 + 40) + 3 * 81 + 3 * 9 + 3);
    }
}

#[test]
fn a_new_router_takes_the_mean_of_all() {
    let loras = loras();
    let (comol, _) = convert(&loras, &LoraOptions::default());
    let outputs: Vec<Vec<Tensor>> = loras.iter().map(|(_, lora)| run_lora(lora)).collect();
    let mean: Vec<Tensor> = (0..WIDTHS.len())
        .map(|layer| {
            let mut sum = vec![0.0; outputs[0][layer].shape().elements()];
            for output in &outputs {
                let output = output[layer].to_f32();
                sum.iter_mut()
                    .zip(output)
                    .for_each(|(sum, x)| *sum += x / 3.0);
            }
            Tensor::f32(outputs[0][layer].shape(), sum).expect("the same shape")
        })
        .collect();
    let apart = largest_difference(&run_mixture(&comol), &mean);
    assert!(apart < 1e-5, "{apart} apart");
}

#[test]
fn what_loras_share_takes_no_room() {
    // The same A in both, and the second B a combination of the first's columns.
    let first = pair(4, 40, 36, 2.0, 1);
    let mut second = pair(4, 40, 36, 0.5, 2);
    second.a = first.a.clone();
    let mixed = first
        .b
        .to_f32()
        .chunks_exact(4)
        .flat_map(|b| [b[0] + b[1], b[2], b[3], b[0]])
        .collect();
    second.b = Tensor::f32([36, 4], mixed).expect("the same shape");
    let adapters = [first, second].map(|pair| {
        (
            String::new(),
            PeftAdapter::of_pairs([(Q.to_owned(), pair)].into()),
        )
    });
    let (_, report) = convert(&adapters, &LoraOptions::default());
    let layer = &report.layers[0];
    assert_eq!((layer.summed_ranks, layer.rank), (8, 4));
    assert!(report.lossless, "{report:?}");
}

/// ‖X - Y‖ / ‖X‖ for the changes of a weight that two adapters make, computed directly.
fn relative_error(was: &PeftAdapter, is: &PeftAdapter, path: &str) -> f64 {
    let change = |adapter: &PeftAdapter| {
        let pair = &adapter.pairs[path];
        let (rank, d_in) = (pair.rank(), pair.a.shape().last());
        let (a, b) = (pair.a.to_f64(), pair.b.to_f64());
        let mut change = Vec::new();
        for row in b.chunks_exact(rank) {
            for column in 0..d_in {
                let sum: f64 = (0..rank).map(|j| row[j] * a[j * d_in + column]).sum();
                change.push(pair.scale * sum);
            }
        }
        change
    };
    let (was, is) = (change(was), change(is));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut was.iter().zip(&is).map(|(x, y)| x - y)) / norm(&mut was.iter().copied())
}

#[test]
fn a_narrow_basis_loses_what_the_report_says_whatever_the_split() {
    let loras = loras();
    let mut last = f64::INFINITY;
    for rank in [1, 3, 5, 8, 10] {
        let options = LoraOptions {
            rank: Some(rank),
            ..LoraOptions::default()
        };
        let (comol, report) = convert(&loras, &options);
        assert!(
            !report.lossless
                && report
                    .layers
                    .iter()
                    .all(|layer| layer.rank == rank.min(9) || layer.layer == Q)
        );
        let q = report
            .layers
            .iter()
            .find(|layer| layer.layer == Q)
            .expect("a layer");
        let mut lost = 0.0;
        for (expert, reported) in q.experts.iter().enumerate() {
            let exported = comol.expert(expert).expect("one of three");
            let found = relative_error(&loras[expert].1, &exported, Q);
            let reported = reported.relative_error;
            assert!(
                (found - reported).abs() < 1e-6,
                "rank {rank}: {found}, reported {reported}"
            );
            assert!(found > 1e-3 && found <= 1.0);
            let scale = loras[expert].1.pairs[Q].scale;
            lost += (found * scale).powi(2);
        }
        assert!(lost < last, "rank {rank} loses more than a smaller one");
        last = lost;

        // B A = (B / 100) (100 A): where it stands makes no difference.
        let mut split = loras.clone();
        let pair = split[0].1.pairs.get_mut(Q).expect("a pair");
        let times = |tensor: &Tensor, factor: f32| {
            let elements = tensor.to_f32().into_iter().map(|x| x * factor).collect();
            Tensor::f32(tensor.shape(), elements).expect("the same shape")
        };
        (pair.a, pair.b) = (times(&pair.a, 128.0), times(&pair.b, 1.0 / 128.0));
        let (_, other) = convert(&split, &options);
        let other = other
            .layers
            .iter()
            .find(|layer| layer.layer == Q)
            .expect("a layer");
        for (one, two) in q.experts.iter().zip(&other.experts) {
            assert!((one.relative_error - two.relative_error).abs() < 1e-6);
        }
    }
}

#[test]
fn a_narrow_basis_keeps_what_changes_the_weight_most() {
    let mut loras = loras();
    // By its scale, not by the size of its matrices.
    loras[2].1.pairs.get_mut(Q).expect("a pair").scale = 300.0;
    let options = LoraOptions {
        rank: Some(5),
        ..LoraOptions::default()
    };
    let (_, report) = convert(&loras, &options);
    let q = report.layers.iter().find(|layer| layer.layer == Q);
    let q = q.expect("a layer");
    assert!(q.experts[2].relative_error < 0.01, "{q:?}");
    assert!(
        q.experts[0].relative_error > 0.5 && q.kept_energy_a > 0.99 && q.kept_energy_b > 0.99,
        "{q:?}"
    );
}

#[test]
fn threads_do_not_change_a_bit_and_every_layer_is_reported() {
    let seen = Mutex::new(Vec::new());
    let loras = loras();
    let note = |layer: &rankmix::convert::CoreLayerReport| {
        seen.lock()
            .expect("no thread has panicked")
            .push(layer.layer.clone());
    };
    let one = in_threads(1, || {
        loras_to_comol(&loras, &LoraOptions::default(), note).expect("sound")
    });
    let three = in_threads(3, || convert(&loras, &LoraOptions::default()));
    assert_eq!(one, three);
    let mut seen = seen.into_inner().expect("no thread has panicked");
    seen.sort();
    assert_eq!(seen, [DOWN, Q]);
    let json = serde_json::to_string(&one.1).expect("plain data");
    let report: CoreReport = serde_json::from_str(&json).expect("what was written");
    assert_eq!(report, one.1);
    let folder = tempfile::tempdir().expect("a folder of its own");
    one.0
        .write(folder.path())
        .expect("a folder that can be written to");
    assert_eq!(
        MixtureAdapter::read(folder.path()).expect("just written"),
        one.0
    );
}

#[test]
fn what_comol_cannot_hold_is_named() {
    let refused = |adapters: &[(String, PeftAdapter)], options: &LoraOptions, word: &str| {
        let error = loras_to_comol(adapters, options, |_| ()).expect_err("this must be refused");
        assert!(error.to_string().contains(word), "{error}");
        error
    };
    let options = LoraOptions::default();
    refused(&[], &options, "adapters");
    let empty = [("one".to_owned(), PeftAdapter::default())];
    refused(&empty, &options, "linear");
    refused(
        &loras(),
        &LoraOptions {
            rank: Some(0),
            ..options
        },
        "rank",
    );
    let router = CoreRouter::Expert(3);
    refused(&loras(), &LoraOptions { router, ..options }, "there are 3");
    let changed = |change: &dyn Fn(&mut PeftAdapter)| {
        let mut loras = loras();
        change(&mut loras[2].1);
        loras
    };
    let other_width =
        changed(&|adapter| _ = adapter.pairs.insert(Q.to_owned(), pair(4, 41, 36, 1.0, 3)));
    let error = refused(&other_width, &options, "lora 2");
    assert!(matches!(error, Error::Shape { .. }), "{error:?}");
    let other_rank = changed(&|adapter| {
        adapter.pairs.get_mut(Q).expect("a pair").a = floats(&[6, 40], 3);
    });
    refused(&other_rank, &options, "[6, 40]");
    let nan = changed(&|adapter| {
        let nan = Tensor::f32([5, 40], vec![f32::NAN; 200]).expect("200 numbers");
        adapter.pairs.get_mut(Q).expect("a pair").a = nan;
    });
    assert!(matches!(
        refused(&nan, &options, Q),
        Error::NotFinite { .. }
    ));
    let fused = changed(&|adapter| {
        let names = vec!["experts.gate_up_proj"].into();
        _ = adapter
            .config
            .others
            .insert("target_parameters".to_owned(), names);
    });
    refused(&fused, &options, "fused");
    let embedding = changed(&|adapter| {
        let mut embedding = pair(5, 30, 40, 1.0, 3);
        embedding.target = Target::Embedding;
        _ = adapter
            .pairs
            .insert("model.embed_tokens".to_owned(), embedding);
        let bias = Some(floats(&[36], 4));
        adapter.pairs.get_mut(Q).expect("a pair").bias = bias;
        _ = adapter
            .others
            .insert("score.weight".to_owned(), floats(&[2, 2], 5));
    });
    refused(&embedding, &options, "left out");
    let (comol, report) = convert(
        &embedding,
        &LoraOptions {
            leave_out: true,
            ..options
        },
    );
    assert_eq!(comol.layers.len(), 2);
    assert_eq!(report.left_out.len(), 3);
    assert!(
        report
            .left_out
            .iter()
            .any(|name| name.contains("score.weight"))
    );
}

#[test]
fn loras_that_were_not_trained_become_cores_of_zeros() {
    let mut loras = loras();
    for (_, lora) in &mut loras {
        for pair in lora.pairs.values_mut() {
            pair.b = Tensor::zeros(&pair.b.ty());
        }
    }
    let (comol, report) = convert(&loras, &LoraOptions::default());
    assert!(report.lossless && report.layers.iter().all(|layer| layer.rank == 1));
    assert!(
        comol.tensors[&format!("{Q}.core")]
            .to_f32()
            .iter()
            .all(|x| *x == 0.0)
    );
}

/// MoE-LoRA layers with all numbers in place, and everything that a gate can have.
fn mixture(rotated: Option<GateInput>) -> MixtureAdapter {
    let sigmoid = Routing {
        score: Score::Sigmoid,
        scale: 1.5,
        selection_bias: true,
        ..Routing::new(4, 2)
    };
    let mut adapter = MixtureAdapter::default();
    for (&(path, d_in, d_out), routing) in WIDTHS.iter().zip([Routing::new(4, 2), sigmoid]) {
        let base = Linear::new(path, d_in, d_out);
        let options = AdapterOptions::new(3, 6.0);
        let layer: MixtureLayer = match rotated {
            None => MoeLora::new(base, options, routing).expect("sound").into(),
            Some(gate) => RotMole::with_rotation(base, options, routing, Rotation::Givens, gate)
                .expect("sound")
                .into(),
        };
        let parameters = layer.parameters().expect("a sound layer");
        for (seed, (name, dims)) in parameters.into_iter().enumerate() {
            let tensor = floats(&dims, seed as u64 + d_in as u64);
            _ = adapter.tensors.insert(name, tensor);
        }
        _ = adapter.layers.insert(path.to_owned(), layer);
    }
    adapter
}

#[test]
fn threads_do_not_change_a_bit_of_a_distilled_mixture() {
    let source = mixture(None);
    let with = |threads| {
        in_threads(threads, || {
            moe_lora_to_comol(&source, &DistillOptions::default(), |_| ()).expect("sound")
        })
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn a_moe_lora_with_its_router_is_the_same_as_comol() {
    let source = mixture(None);
    let options = DistillOptions::default();
    let (comol, report) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    let apart = largest_difference(&run_mixture(&comol), &run_mixture(&source));
    assert!(apart < 1e-5, "{apart} apart");
    assert!(report.lossless && report.left_out.is_empty(), "{report:?}");
    assert!(
        report
            .layers
            .iter()
            .all(|layer| layer.rank == 12 && layer.router_error.is_none())
    );

    let narrow = DistillOptions {
        rank: Some(6),
        ..options
    };
    let (comol, report) = moe_lora_to_comol(&source, &narrow, |_| ()).expect("sound");
    assert!(!report.lossless);
    assert!(largest_difference(&run_mixture(&comol), &run_mixture(&source)) > 1e-3);
}

#[test]
fn a_router_that_reads_what_the_experts_read_can_be_projected() {
    let options = DistillOptions {
        rank: None,
        routing: CoreRouting::Core,
    };
    let mut source = mixture(None);
    let (_, report) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    assert!(
        report
            .layers
            .iter()
            .all(|layer| layer.router_error.is_some_and(|error| error > 0.1))
    );
    // Rows of the experts' A are inside of the basis.
    for (path, d_in, _) in WIDTHS {
        let a = source.tensors[&format!("{path}.lora_a")].to_f32();
        let rows = (0..4).flat_map(|expert| a[expert * 3 * d_in..][..d_in].to_vec());
        let router = Tensor::f32([4, d_in], rows.collect()).expect("four rows");
        _ = source.tensors.insert(format!("{path}.router"), router);
    }
    let (comol, report) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    assert!(
        report
            .layers
            .iter()
            .all(|layer| layer.router_error.is_some_and(|error| error < 1e-6))
    );
    let apart = largest_difference(&run_mixture(&comol), &run_mixture(&source));
    assert!(apart < 1e-5, "{apart} apart");
}

#[test]
fn rotations_by_the_token_are_left_out_and_said_so() {
    let mut source = mixture(Some(GateInput::Input));
    let options = DistillOptions::default();
    let (comol, report) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    assert_eq!(report.left_out.len(), 2);
    assert!(report.left_out[0].contains(DOWN), "{report:?}");
    // The experts are those at rotation 0.
    assert!(largest_difference(&run_mixture(&comol), &run_mixture(&source)) > 1e-3);
    let without = without_rotations(&mut source);
    let apart = largest_difference(&run_mixture(&comol), &without);
    assert!(apart < 1e-5, "{apart} apart");
}

#[test]
fn static_rotations_become_part_of_the_cores() {
    let mut source = mixture(Some(GateInput::Static));
    let options = DistillOptions::default();
    let (comol, report) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    assert!(report.lossless && report.left_out.is_empty(), "{report:?}");
    let rotated = run_mixture(&source);
    let apart = largest_difference(&run_mixture(&comol), &rotated);
    assert!(apart < 1e-5, "{apart} apart");
    assert!(largest_difference(&without_rotations(&mut source), &rotated) > 1e-3);
}

/// What the layers compute with all numbers of their rotations at 0.
fn without_rotations(source: &mut MixtureAdapter) -> Vec<Tensor> {
    for (name, tensor) in &mut source.tensors {
        if name.contains(".rotation_") {
            *tensor = Tensor::zeros(&tensor.ty());
        }
    }
    run_mixture(source)
}

#[test]
fn what_cannot_be_distilled_is_refused() {
    let mut source = mixture(None);
    let options = DistillOptions::default();
    let (comol, _) = moe_lora_to_comol(&source, &options, |_| ()).expect("sound");
    let error = moe_lora_to_comol(&comol, &options, |_| ()).expect_err("it is CoMoL");
    assert!(error.to_string().contains("CoMoL already"), "{error}");
    _ = source
        .blocks
        .insert(DOWN.to_owned(), "model.layers.0.mlp".to_owned());
    let error = moe_lora_to_comol(&source, &options, |_| ()).expect_err("a gate of a block");
    assert!(error.to_string().contains("gate_of"), "{error}");
    source.blocks.clear();
    _ = source.tensors.remove(&format!("{Q}.router"));
    let error = moe_lora_to_comol(&source, &options, |_| ()).expect_err("no router");
    assert!(matches!(error, Error::UnknownName { .. }), "{error:?}");
}
