//! Our layout for mixtures of LoRA experts: round trips and exports.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use rankmix::formats::{
    Adapter, MixtureAdapter, MixtureKind, MixtureLayer, PeftAdapter, TensorFile,
};
use rankmix::layers::{
    AdapterOptions, AdapterScale, Capacity, CoMol, CoreRouting, GateInput, Linear, Lora, MoeLora,
    RotMole, Routing,
};
use rankmix::ops::{BalanceForm, CoreMix, DropPolicy, Rotation, Score};
use rankmix::{Device, Error, Graph, ParameterStore, Tensor, TensorType, Value};

const TOKENS: usize = 12;

/// Numbers around 0 that are all different.
pub(crate) fn floats(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| ((i + 31 * seed) as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

fn forward(layer: &MixtureLayer, graph: &mut Graph, x: Value) -> Value {
    match layer {
        MixtureLayer::MoeLora(layer) => layer.forward(graph, x).map(|routed| routed.output),
        MixtureLayer::RotMole(layer) => layer.forward(graph, x).map(|routed| routed.output),
        MixtureLayer::CoMol(layer) => layer.forward(graph, x).map(|mixed| mixed.output),
    }
    .expect("a sound layer")
}

/// A graph of layers that all read the same input, and their outputs.
fn graph(layers: &[MixtureLayer]) -> (Graph, Vec<Value>) {
    let mut graph = Graph::new();
    let mut outputs = Vec::new();
    for layer in layers {
        let name = format!("x of {}", layer.base().d_in);
        let x = graph
            .named(&name)
            .or_else(|_| graph.input(&name, TensorType::f32([TOKENS, layer.base().d_in])));
        let output = forward(layer, &mut graph, x.expect("an input"));
        graph.output(output).expect("a value of the graph");
        outputs.push(output);
    }
    (graph, outputs)
}

/// A store with numbers in every parameter, none of them zeros.
fn filled(graph: &Graph) -> ParameterStore {
    let store = ParameterStore::new(&Device::cpu());
    for (seed, spec) in graph.parameters().iter().enumerate() {
        let tensor = floats(spec.ty.dims(), seed + 1);
        store.insert(&spec.name, &tensor).expect("memory");
    }
    store
}

fn run(graph: &Graph, outputs: &[Value], store: &ParameterStore) -> Vec<Tensor> {
    let mut session = graph.compile(store).expect("a sound graph");
    let inputs: BTreeSet<usize> = (1..100)
        .filter(|d| graph.named(&format!("x of {d}")).is_ok())
        .collect();
    for d_in in inputs {
        let x = floats(&[TOKENS, d_in], 77);
        session.set(&format!("x of {d_in}"), &x).expect("an input");
    }
    session.run_reading(outputs).expect("a run")
}

/// Layers of one kind that differ in everything that layers can differ in.
pub(crate) fn layers(kind: MixtureKind) -> Vec<MixtureLayer> {
    let q = || Linear::new("model.layers.0.self_attn.q_proj", 10, 7);
    let down = || Linear::new("model.layers.11.mlp.down_proj", 14, 10).with_bias();
    let k = || Linear::new("model.layers.1.self_attn.k_proj", 10, 6);
    let options = AdapterOptions::new(4, 6.5);
    let mut stabilised = AdapterOptions::new(6, 0.1).with_dropout(0.05);
    stabilised.scale = AdapterScale::RankStabilized;
    let everything = Routing {
        renormalize: false,
        score: Score::Sigmoid,
        scale: 2.5,
        selection_bias: true,
        jitter: 0.01,
        capacity: Some(Capacity {
            factor: 1.1,
            drop: DropPolicy::Gate,
        }),
        balance: BalanceForm::HuggingFace,
        ..Routing::new(5, 3)
    };
    let plain = Routing::new(3, 2);
    match kind {
        MixtureKind::MoeLora => vec![
            MoeLora::new(q(), options, plain).expect("sound").into(),
            MoeLora::new(down(), stabilised, everything)
                .expect("sound")
                .into(),
        ],
        MixtureKind::RotMole => {
            let rotated = |base, options, routing, rotation, gate_input| {
                RotMole::with_rotation(base, options, routing, rotation, gate_input).expect("sound")
            };
            vec![
                rotated(q(), options, plain, Rotation::Planes, GateInput::Input).into(),
                rotated(
                    down(),
                    stabilised,
                    everything,
                    Rotation::BrickWall { layers: 3 },
                    GateInput::Latent,
                )
                .with_bounded_generator()
                .into(),
                rotated(
                    k(),
                    options,
                    Routing::new(1, 1),
                    Rotation::Cayley,
                    GateInput::Static,
                )
                .into(),
            ]
        }
        MixtureKind::CoMol => {
            let comol = |base, options, experts| CoMol::new(base, options, experts).expect("sound");
            vec![
                comol(q(), options, 3)
                    .sharing_a("model.layers.0.attention")
                    .into(),
                comol(
                    Linear::new("model.layers.0.self_attn.v_proj", 10, 6),
                    options,
                    2,
                )
                .sharing_a("model.layers.0.attention")
                .sharing_b("key.value")
                .with_mix(CoreMix::Merge)
                .into(),
                comol(k(), options, 1)
                    .sharing_b("key.value")
                    .with_mix(CoreMix::Apply)
                    .into(),
                comol(down(), stabilised, 5)
                    .with_routing(CoreRouting::Raw)
                    .with_sparse_gate(everything)
                    .expect("sound")
                    .into(),
            ]
        }
    }
}

pub(crate) fn adapter(kind: MixtureKind) -> MixtureAdapter {
    let layers = layers(kind);
    let store = filled(&graph(&layers).0);
    let mut adapter = MixtureAdapter::from_store(&store, layers).expect("all parameters");
    let base = "some/model".into();
    adapter
        .others
        .insert("base_model_name_or_path".to_owned(), base);
    adapter
        .others
        .insert("its_own_key".to_owned(), vec![1, 2].into());
    adapter
}

#[test]
fn parameters_are_those_that_the_layers_declare() {
    for layer in MixtureKind::ALL.into_iter().flat_map(layers) {
        let base = [".weight", ".bias"].map(|end| format!("{}{end}", layer.base().name));
        let (graph, _) = graph(std::slice::from_ref(&layer));
        let declared: BTreeMap<String, Vec<usize>> = graph
            .parameters()
            .iter()
            .filter(|spec| !base.contains(&spec.name))
            .map(|spec| (spec.name.clone(), spec.ty.dims().to_vec()))
            .collect();
        let said = layer.parameters().expect("a sound layer");
        assert_eq!(
            said.into_iter().collect::<BTreeMap<_, _>>(),
            declared,
            "{layer:?}"
        );
    }
}

#[test]
fn layers_come_back_bit_for_bit_and_compute_the_same() {
    for kind in MixtureKind::ALL {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let written = layers(kind);
        let (before, outputs) = graph(&written);
        let store = filled(&before);
        let expected = run(&before, &outputs, &store);
        let adapter = MixtureAdapter::from_store(&store, written.clone()).expect("all parameters");
        adapter
            .write(folder.path())
            .expect("a folder that can be written to");

        let read = MixtureAdapter::read(folder.path()).expect("the folder just written");
        assert_eq!(read, adapter);
        assert_eq!(read.kind(), Some(kind));
        // In the order that they were made in, as the file keeps them by name.
        let built: Vec<MixtureLayer> = written
            .iter()
            .map(|layer| read.layers[&layer.base().name].clone())
            .collect();
        assert_eq!(built, written);
        let (after, outputs) = graph(&built);
        let second = ParameterStore::new(&Device::cpu());
        for name in store.names() {
            if name.ends_with(".weight") || name.ends_with(".bias") {
                let tensor = store.read(&name).expect("a parameter");
                second.insert(&name, &tensor).expect("memory");
            }
        }
        read.load_into(&second).expect("parameters of these layers");
        assert_eq!(second.names(), store.names());
        assert_eq!(
            run(&after, &outputs, &second),
            expected,
            "{kind} computes something else"
        );

        // Again, over what is there: the same bytes.
        let files = ["adapter_config.json", "adapter_model.safetensors"];
        let bytes = |name: &str| fs::read(folder.path().join(name)).expect("a file just written");
        let before = files.map(bytes);
        read.write(folder.path())
            .expect("a folder that can be written to");
        assert!(
            files.map(bytes) == before,
            "{kind}: a second round changes the files"
        );
    }
}

#[test]
fn tensors_have_the_names_and_shapes_of_the_layout() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let shapes = |kind| {
        adapter(kind)
            .write(folder.path())
            .expect("a folder that can be written to");
        let path = folder.path().join("adapter_model.safetensors");
        let file = TensorFile::read(path).expect("the file just written");
        assert_eq!(file.metadata["format"], "rankmix");
        assert_eq!(file.metadata["format_version"], "1");
        let shape = |(name, tensor): (String, Tensor)| (name, tensor.shape().dims().to_vec());
        file.tensors
            .into_iter()
            .map(shape)
            .collect::<BTreeMap<_, _>>()
    };
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let rotated = shapes(MixtureKind::RotMole);
    assert_eq!(rotated[&format!("{q}.moe_gate.weight")], [3, 10]);
    assert_eq!(rotated[&format!("{q}.experts.2.lora_A.weight")], [4, 10]);
    assert_eq!(rotated[&format!("{q}.experts.0.lora_B.weight")], [7, 4]);
    assert_eq!(rotated[&format!("{q}.rotation_gate.1.weight")], [2, 10]);
    let k = "base_model.model.model.layers.1.self_attn.k_proj";
    assert_eq!(rotated[&format!("{k}.rotation_generator")], [1, 6]);
    let down = "base_model.model.model.layers.11.mlp.down_proj";
    assert_eq!(rotated[&format!("{down}.moe_gate.bias")], [5]);
    let core = shapes(MixtureKind::CoMol);
    assert_eq!(core[&format!("{q}.core")], [3, 4, 4]);
    assert_eq!(core[&format!("{q}.moe_gate.weight")], [3, 4]);
    assert_eq!(core[&format!("{down}.moe_gate.weight")], [5, 14]);
    // Shared by two layers each, and in the file once.
    let a = "base_model.model.model.layers.0.attention.lora_A.weight";
    assert_eq!(core[a], [4, 10]);
    assert_eq!(core["base_model.model.key.value.lora_B.weight"], [6, 4]);
    assert!(!core.contains_key(&format!("{q}.lora_A.weight")));
    assert_eq!(core.len(), 4 * 2 + 1 + 2 + 2 + 2);
}

#[test]
fn keys_of_others_are_kept_and_the_kind_is_found() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let adapter = adapter(MixtureKind::RotMole);
    adapter
        .write(folder.path())
        .expect("a folder that can be written to");
    let read = MixtureAdapter::read(folder.path()).expect("the folder just written");
    assert_eq!(read.unknown_keys(), ["its_own_key"]);
    let any = Adapter::read(folder.path()).expect("the folder just written");
    assert_eq!(any, Adapter::Mixture(adapter));
    assert_damaged!(PeftAdapter::read(folder.path()), "ROTMOLE", "LORA");
}

/// What plain LoRA layers compute with the pairs of an adapter, on the weights of a store.
fn run_lora(adapter: &PeftAdapter, layers: &[MixtureLayer], from: &ParameterStore) -> Vec<Tensor> {
    let mut graph = Graph::new();
    let mut outputs = Vec::new();
    let store = ParameterStore::new(from.device());
    for layer in layers {
        let base = layer.base();
        let name = format!("x of {}", base.d_in);
        let x = graph
            .named(&name)
            .or_else(|_| graph.input(&name, TensorType::f32([TOKENS, base.d_in])));
        let options = adapter.pairs[&base.name].options();
        let lora = Lora::new(base.clone(), options).expect("sound");
        let output = lora
            .forward(&mut graph, x.expect("an input"))
            .expect("sound");
        graph.output(output).expect("a value of the graph");
        outputs.push(output);
        store
            .share(&format!("{}.weight", base.name), from)
            .expect("the same device");
    }
    adapter.load_into(&store).expect("pairs of these layers");
    run(&graph, &outputs, &store)
}

fn largest_difference(one: &[Tensor], other: &[Tensor]) -> f32 {
    let pairs = one.iter().zip(other);
    let pairs = pairs.flat_map(|(one, other)| one.to_f32().into_iter().zip(other.to_f32()));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn a_comol_of_one_expert_is_the_lora_that_it_exports() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let mut options = AdapterOptions::new(4, 6.5);
    options.scale = AdapterScale::RankStabilized;
    let q = CoMol::new(Linear::new("layers.0.q_proj", 10, 7), options, 1).expect("sound");
    let k = CoMol::new(
        Linear::new("layers.0.k_proj", 10, 6),
        AdapterOptions::new(3, 3.0),
        1,
    )
    .expect("sound");
    let routing = Routing {
        scale: 1.5,
        ..Routing::new(1, 1)
    };
    let layers: Vec<MixtureLayer> =
        vec![q.into(), k.with_sparse_gate(routing).expect("sound").into()];
    let (graph, outputs) = graph(&layers);
    let store = filled(&graph);
    let expected = run(&graph, &outputs, &store);
    let adapter = MixtureAdapter::from_store(&store, layers.clone()).expect("all parameters");
    let lora = adapter.expert(0).expect("there is one");
    lora.write(folder.path())
        .expect("PEFT would compute the same");
    let lora = PeftAdapter::read(folder.path()).expect("the folder just written");
    let found = run_lora(&lora, &layers, &store);
    let apart = largest_difference(&found, &expected);
    assert!(apart < 1e-5, "{apart} apart");
    let merged = adapter.merged_cores(&[1.0]).expect("one gate");
    assert_eq!(merged, adapter.expert(0).expect("there is one"));
    let adapter_alone = largest_difference(
        &run(&graph, &outputs, &store),
        &run_lora(&merged, &layers, &store),
    );
    assert!(adapter_alone < 1e-5);
    assert!(matches!(
        adapter.expert(1),
        Err(Error::Setting {
            setting: "expert",
            ..
        })
    ));
    assert!(matches!(
        adapter.merged_cores(&[0.5, 0.5]),
        Err(Error::Setting {
            setting: "gates",
            ..
        })
    ));
}

#[test]
fn every_expert_of_a_mixture_is_the_lora_that_it_exports() {
    // A bias for the choice sends every token to one expert.
    let routing = Routing {
        selection_bias: true,
        scale: 0.75,
        ..Routing::new(3, 1)
    };
    let base = |name| Linear::new(name, 10, 7);
    let options = AdapterOptions::new(4, 6.5);
    let planes = RotMole::new(base("layers.0.q_proj"), options, routing).expect("sound");
    let plain = MoeLora::new(base("layers.0.q_proj"), options, routing).expect("sound");
    let comol = CoMol::new(base("layers.0.q_proj"), options, 3).expect("sound");
    for layer in [
        MixtureLayer::from(planes),
        plain.into(),
        comol.with_sparse_gate(routing).expect("sound").into(),
    ] {
        let layers = [layer];
        let (graph, outputs) = graph(&layers);
        let store = filled(&graph);
        if let Some(gate) = store.ty("layers.0.q_proj.rotation_gate") {
            // What has no rotation is what it computes at rotation 0.
            store
                .insert("layers.0.q_proj.rotation_gate", &Tensor::zeros(&gate))
                .expect("memory");
        }
        let adapter = MixtureAdapter::from_store(&store, layers.clone()).expect("all parameters");
        for expert in 0..3 {
            let mut bias = vec![0.0; 3];
            bias[expert] = 100.0;
            let bias = Tensor::f32([3], bias).expect("three numbers");
            store
                .insert("layers.0.q_proj.router_bias", &bias)
                .expect("memory");
            let lora = adapter.expert(expert).expect("one of three");
            let expected = run(&graph, &outputs, &store);
            let apart = largest_difference(&run_lora(&lora, &layers, &store), &expected);
            assert!(
                apart < 1e-5,
                "expert {expert} of {:?}: {apart} apart",
                layers[0].kind()
            );
        }
        assert_eq!(
            adapter.merged_cores(&[1.0; 3]).is_ok(),
            layers[0].kind() == MixtureKind::CoMol
        );
    }
}

#[test]
fn a_static_rotation_is_in_the_lora_that_is_exported() {
    let routing = Routing {
        selection_bias: true,
        scale: 0.75,
        ..Routing::new(3, 1)
    };
    for (rotation, bounded) in Rotation::ALL
        .into_iter()
        .zip([true, false].into_iter().cycle())
    {
        let mut layer = RotMole::with_rotation(
            Linear::new("layers.0.q_proj", 10, 7),
            AdapterOptions::new(4, 6.5),
            routing,
            rotation,
            GateInput::Static,
        )
        .expect("sound");
        layer.bounded = bounded;
        let layers = [MixtureLayer::from(layer)];
        let (graph, outputs) = graph(&layers);
        let store = filled(&graph);
        let adapter = MixtureAdapter::from_store(&store, layers.clone()).expect("all parameters");
        for expert in 0..3 {
            let mut bias = vec![0.0; 3];
            bias[expert] = 100.0;
            let bias = Tensor::f32([3], bias).expect("three numbers");
            store
                .insert("layers.0.q_proj.router_bias", &bias)
                .expect("memory");
            let lora = adapter.expert(expert).expect("one of three");
            let expected = run(&graph, &outputs, &store);
            let apart = largest_difference(&run_lora(&lora, &layers, &store), &expected);
            assert!(apart < 1e-5, "{rotation}, expert {expert}: {apart} apart");
            let name = "layers.0.q_proj.lora_b";
            let b = adapter.tensors[name].to_f32();
            let b = &b[expert * 28..(expert + 1) * 28];
            assert_ne!(lora.pairs["layers.0.q_proj"].b.to_f32(), b, "{rotation}");
        }
    }
}

#[test]
fn an_exported_gate_is_1_only_where_gates_are_renormalised() {
    for (renormalize, alike) in [(true, true), (false, false)] {
        let routing = Routing {
            renormalize,
            ..Routing::new(3, 1)
        };
        let base = Linear::new("layers.0.q_proj", 10, 7);
        let layer = MoeLora::new(base, AdapterOptions::new(4, 6.5), routing).expect("sound");
        let layers = [MixtureLayer::from(layer)];
        let (graph, outputs) = graph(&layers);
        let store = filled(&graph);
        // All logits 0: by the order of experts the first is taken, at a score of a third.
        let router = store.ty("layers.0.q_proj.router").expect("a parameter");
        store
            .insert("layers.0.q_proj.router", &Tensor::zeros(&router))
            .expect("memory");
        let adapter = MixtureAdapter::from_store(&store, layers.clone()).expect("all parameters");
        let lora = adapter.expert(0).expect("one of three");
        let apart = largest_difference(
            &run_lora(&lora, &layers, &store),
            &run(&graph, &outputs, &store),
        );
        assert_eq!(apart < 1e-5, alike, "{apart} apart");
    }
}

#[test]
fn a_store_of_the_reference_device_is_written_in_32_bits() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let layers = layers(MixtureKind::CoMol);
    let (graph, _) = graph(&layers);
    let store = ParameterStore::new(&Device::reference());
    store.initialize(&graph, 1).expect("memory");
    let adapter = MixtureAdapter::from_store(&store, layers).expect("all parameters");
    adapter.write(folder.path()).expect("a folder of its own");
    let read = MixtureAdapter::read(folder.path()).expect("the folder just written");
    assert_eq!(read, adapter);
}
