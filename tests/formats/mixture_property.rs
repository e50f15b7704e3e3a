//! Our layout for mixtures of LoRA experts: what is written is read, and what would not be read is not written.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rankmix::formats::{MixtureAdapter, MixtureKind, MixtureLayer};
use rankmix::layers::{
    AdapterOptions, AdapterScale, Capacity, CoMol, CoreRouting, GateInput, Linear, MoeLora,
    RotMole, Routing,
};
use rankmix::ops::{BalanceForm, CoreMix, DropPolicy, Rotation, Score};
use rankmix::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::mixture::{adapter, floats};

/// Mostly the one, now and then the other.
fn mostly<T: std::fmt::Debug + 'static>(
    sound: impl Strategy<Value = T> + 'static,
    odd: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![40 => sound, 1 => odd]
}

fn options() -> impl Strategy<Value = AdapterOptions> {
    let rank = mostly(prop::sample::select(vec![2, 4, 6]), 0..6_usize);
    let alpha = mostly(
        any::<f32>().prop_filter("finite", |alpha| alpha.is_finite()),
        prop::sample::select(vec![f32::NAN, f32::INFINITY]),
    );
    let dropout = mostly(
        0.0..1.0_f32,
        prop::sample::select(vec![f32::NAN, 1.0, -0.5]),
    );
    (rank, alpha, any::<bool>(), dropout).prop_map(|(rank, alpha, stabilised, dropout)| {
        let mut options = AdapterOptions::new(rank, alpha).with_dropout(dropout);
        if stabilised {
            options.scale = AdapterScale::RankStabilized;
        }
        options
    })
}

fn routing() -> impl Strategy<Value = Routing> {
    let experts = mostly(1..5_usize, Just(0));
    let capacity = prop::option::of((
        mostly(
            0.1..4.0_f64,
            prop::sample::select(vec![0.0, -1.0, f64::NAN]),
        ),
        prop::sample::select(vec![DropPolicy::Gate, DropPolicy::default()]),
    ));
    let scale = mostly(0.1..4.0_f32, prop::sample::select(vec![0.0, f32::NAN]));
    let jitter = mostly(0.0..1.0_f32, prop::sample::select(vec![1.0, f32::NAN]));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (
        experts,
        mostly(Just(0), -2..3_isize),
        any::<prop::sample::Index>(),
        capacity,
        scale,
        jitter,
        flags,
    )
        .prop_map(|(experts, off, top_k, capacity, scale, jitter, flags)| {
            let top_k = 1 + top_k.index(experts.max(1));
            Routing {
                renormalize: flags.0,
                score: if flags.1 {
                    Score::Sigmoid
                } else {
                    Score::Softmax
                },
                scale,
                selection_bias: flags.2,
                jitter,
                capacity: capacity.map(|(factor, drop)| Capacity { factor, drop }),
                balance: if flags.3 {
                    BalanceForm::HuggingFace
                } else {
                    BalanceForm::Switch
                },
                ..Routing::new(experts, top_k.saturating_add_signed(off))
            }
        })
}

fn path() -> impl Strategy<Value = String> {
    mostly(
        "[a-zé{}\" _0-9]{1,5}(\\.[a-z0-9]{1,3}){0,2}",
        prop::sample::select(vec!["", "a..b", "a/b", "a\\b", "a\nb", ".", "a."]).prop_map_into(),
    )
}

fn layer(kind: MixtureKind) -> impl Strategy<Value = MixtureLayer> {
    let rotation = mostly(
        prop::sample::select(Rotation::ALL.to_vec()),
        Just(Rotation::BrickWall { layers: 0 }),
    );
    let gate = prop::sample::select(vec![GateInput::Input, GateInput::Latent, GateInput::Static]);
    let mix = prop::sample::select(vec![CoreMix::Auto, CoreMix::Merge, CoreMix::Apply]);
    let shared = || prop::option::of(path());
    (
        (path(), 1..5_usize, 1..5_usize, any::<bool>(), any::<bool>()),
        options(),
        routing(),
        (rotation, gate, any::<bool>()),
        (
            any::<bool>(),
            any::<bool>(),
            mix,
            shared(),
            shared(),
            mostly(Just(0), 0..2_usize),
        ),
    )
        .prop_map(move |(base, options, routing, rotated, core)| {
            let (name, d_in, d_out, bias, trainable) = base;
            let base = Linear {
                name,
                d_in,
                d_out,
                trainable,
                bias,
            };
            // By their fields: constructors would refuse what is to be refused later.
            let mixture = MoeLora {
                base: base.clone(),
                options,
                routing,
            };
            match kind {
                MixtureKind::MoeLora => mixture.into(),
                MixtureKind::RotMole => RotMole {
                    mixture,
                    rotation: rotated.0,
                    gate_input: rotated.1,
                    bounded: rotated.2,
                }
                .into(),
                MixtureKind::CoMol => CoMol {
                    base,
                    options,
                    experts: routing.experts + core.5,
                    routing: if core.0 {
                        CoreRouting::Raw
                    } else {
                        CoreRouting::Core
                    },
                    sparse: core.1.then_some(routing),
                    mix: core.2,
                    shared_a: core.3,
                    shared_b: core.4,
                }
                .into(),
            }
        })
}

fn others() -> impl Strategy<Value = Map<String, Value>> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,4}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map(".{0,3}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    // Deeper than the parser goes.
    let deep = (0..200).fold(Value::Null, |inner, _| json!([inner]));
    let key = mostly(
        "[a-z_]{8,9}",
        prop::sample::select(vec!["r", "format", "gate_of", "rotation", "layer_options"])
            .prop_map_into(),
    );
    prop::collection::btree_map(key, mostly(value, Just(deep)), 0..4)
        .prop_map(|map| map.into_iter().collect())
}

/// Bits from a counter, of which few are not finite; those are made finite but for one in many.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let bits = (0..count as u64).map(|i| {
        let mixed = (seed.wrapping_add(i)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        f32::from_bits((mixed >> 32) as u32)
    });
    let odd = seed.is_multiple_of(60);
    bits.map(|number| {
        if number.is_finite() || odd {
            number
        } else {
            -0.0
        }
    })
    .collect()
}

fn mixtures() -> impl Strategy<Value = MixtureAdapter> {
    let layers = prop::sample::select(MixtureKind::ALL.to_vec()).prop_flat_map(|kind| {
        let other = prop::sample::select(MixtureKind::ALL.to_vec()).prop_flat_map(layer);
        mostly(
            prop::collection::vec(layer(kind), 1..4),
            prop::collection::vec(other, 0..3),
        )
    });
    // Mostly without: a mixture of another kind cannot have them.
    let block = prop_oneof![9 => Just(None), 1 => path().prop_map(Some)];
    (
        layers,
        others(),
        block,
        1..u64::MAX,
        mostly(Just(false), Just(true)),
    )
        .prop_map(|(layers, others, block, seed, wide)| {
            let mut adapter = MixtureAdapter {
                others,
                ..MixtureAdapter::default()
            };
            for layer in layers {
                let path = layer.base().name.clone();
                for (name, dims) in layer.parameters().unwrap_or_default() {
                    let count = dims.iter().product();
                    let tensor = if wide {
                        Tensor::f64(dims, vec![0.1; count])
                    } else {
                        Tensor::f32(dims, numbers(count, seed))
                    };
                    if let Ok(tensor) = tensor {
                        adapter.tensors.insert(name, tensor);
                    }
                }
                adapter.layers.insert(path, layer);
            }
            if let (Some(block), Some(path)) = (block, adapter.layers.keys().next()) {
                let path = path.clone();
                // A block's gate is as wide as what the block reads.
                let name = format!("{path}.router");
                if let Some(gate) = adapter.tensors.get_mut(&name) {
                    *gate = floats(&[gate.shape().dims()[0], 7], 1);
                }
                adapter.blocks.insert(path, block);
            }
            adapter
        })
}

/// What is to come back: the base layers frozen.
fn frozen(adapter: &MixtureAdapter) -> MixtureAdapter {
    let mut adapter = adapter.clone();
    for layer in adapter.layers.values_mut() {
        let base = match layer {
            MixtureLayer::MoeLora(layer) => &mut layer.base,
            MixtureLayer::RotMole(layer) => &mut layer.mixture.base,
            MixtureLayer::CoMol(layer) => &mut layer.base,
        };
        base.trainable = false;
    }
    adapter
}

/// Every number's bits: 0 and -0 are equal otherwise.
fn bits(adapter: &MixtureAdapter) -> BTreeMap<&String, Vec<u32>> {
    let tensors = adapter.tensors.iter();
    tensors
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), DType::F32);
            let numbers = tensor.to_f32();
            (
                name,
                numbers.iter().map(|number| number.to_bits()).collect(),
            )
        })
        .collect()
}

#[test]
fn what_is_written_is_read_bit_for_bit_and_nothing_else_is_written() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("out");
    let config = Config {
        cases: 300,
        failure_persistence: None,
        ..Config::default()
    };
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, random);
    let [written, refused] = [const { Cell::new(0) }; 2];
    let result = runner.run(&mixtures(), |adapter| {
        let sound = adapter.check().is_ok() && !adapter.layers.is_empty();
        match adapter.write(&path) {
            Ok(()) => {
                prop_assert!(sound, "written, and the check refuses it");
                let read = MixtureAdapter::read(&path);
                fs::remove_dir_all(&path).expect("the folder just written");
                let read = read.map_err(|error| TestCaseError::fail(error.to_string()))?;
                prop_assert_eq!(bits(&read), bits(&adapter));
                prop_assert_eq!(read, frozen(&adapter));
                written.set(written.get() + 1);
            }
            Err(error) => {
                prop_assert!(!sound, "checked, and not written: {}", error);
                prop_assert!(!path.exists(), "a folder was made");
                refused.set(refused.get() + 1);
            }
        }
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let counts = (written.get(), refused.get());
    assert!(counts.0 > 60 && counts.1 > 30, "{counts:?}");
}

/// A change of `adapter_config.json`, and the same change of the adapter.
type Change = (
    MixtureKind,
    &'static str,
    fn(&mut Value),
    fn(&mut MixtureAdapter),
);

const Q: &str = "model.layers.0.self_attn.q_proj";

fn q(adapter: &mut MixtureAdapter) -> (&mut AdapterOptions, &mut Routing) {
    match adapter.layers.get_mut(Q) {
        Some(MixtureLayer::MoeLora(layer)) => (&mut layer.options, &mut layer.routing),
        Some(MixtureLayer::RotMole(layer)) => {
            (&mut layer.mixture.options, &mut layer.mixture.routing)
        }
        _ => unreachable!("a layer of these kinds"),
    }
}

/// Options that both sides refuse, by the word that both name. The first layer's options are those of the file.
#[test]
fn what_reading_refuses_is_not_written() {
    use MixtureKind::{CoMol as Cores, MoeLora as Plain, RotMole as Rotated};
    let changes: [Change; 14] = [
        (
            Plain,
            "top_k",
            |config| config["routing"]["top_k"] = 4.into(),
            |adapter| q(adapter).1.top_k = 4,
        ),
        (
            Plain,
            "top_k",
            |config| config["routing"]["top_k"] = 0.into(),
            |adapter| q(adapter).1.top_k = 0,
        ),
        (
            Plain,
            "dropout",
            |config| config["lora_dropout"] = 1.0.into(),
            |adapter| q(adapter).0.dropout = 1.0,
        ),
        (
            // JSON has no NaN.
            Plain,
            "",
            |config| config["lora_dropout"] = Value::Null,
            |adapter| q(adapter).0.dropout = f32::NAN,
        ),
        (
            Plain,
            "1048577",
            |config| config["r"] = 1_048_577.into(),
            |adapter| {
                q(adapter).0.rank = 1_048_577;
            },
        ),
        (
            Plain,
            "65537",
            |config| config["num_experts"] = 65_537.into(),
            |adapter| q(adapter).1.experts = 65_537,
        ),
        (
            Plain,
            "jitter",
            |config| config["routing"]["jitter"] = 1.5.into(),
            |adapter| q(adapter).1.jitter = 1.5,
        ),
        (
            Plain,
            "scale",
            |config| config["routing"]["scale"] = 0.0.into(),
            |adapter| q(adapter).1.scale = 0.0,
        ),
        (
            Plain,
            "capacity factor",
            |config| config["routing"]["capacity"] = json!({"factor": -1.0}),
            |adapter| {
                let drop = DropPolicy::default();
                q(adapter).1.capacity = Some(Capacity { factor: -1.0, drop });
            },
        ),
        (
            Plain,
            "names with dots",
            |config| config["layer_options"][Q] = json!({"gate_of": "a..b"}),
            |adapter| _ = adapter.blocks.insert(Q.to_owned(), "a..b".to_owned()),
        ),
        (
            Rotated,
            "gate_of",
            |config| config["layer_options"][Q] = json!({"gate_of": "block"}),
            |adapter| _ = adapter.blocks.insert(Q.to_owned(), "block".to_owned()),
        ),
        (
            Cores,
            "gate_of",
            |config| config["layer_options"][Q]["gate_of"] = "block".into(),
            |adapter| _ = adapter.blocks.insert(Q.to_owned(), "block".to_owned()),
        ),
        (
            Cores,
            "names with dots",
            |config| config["layer_options"][Q]["shared_a"] = "a..b".into(),
            |adapter| {
                if let Some(MixtureLayer::CoMol(layer)) = adapter.layers.get_mut(Q) {
                    layer.shared_a = Some("a..b".to_owned());
                }
            },
        ),
        (
            Plain,
            "rotation",
            |config| config["rotation"] = "planes".into(),
            |adapter| {
                let key = "rotation".to_owned();
                adapter.others.insert(key, "planes".into());
            },
        ),
    ];
    let folder = tempfile::tempdir().expect("a folder of its own");
    for (kind, word, of_file, of_adapter) in changes {
        let mut changed = adapter(kind);
        changed.write(folder.path()).expect("a folder of its own");
        let path = folder.path().join("adapter_config.json");
        let text = fs::read_to_string(&path).expect("the file just written");
        let mut config: Value = serde_json::from_str(&text).expect("JSON");
        of_file(&mut config);
        fs::write(&path, config.to_string()).expect("a folder of its own");
        assert_damaged!(MixtureAdapter::read(folder.path()), word);
        of_adapter(&mut changed);
        let out = folder.path().join("out");
        let error = changed.write(&out).expect_err("it would not be read");
        assert!(error.to_string().contains(word), "{word}: {error}");
        assert!(!out.exists());
    }
}
