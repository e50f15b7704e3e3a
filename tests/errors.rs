//! A user's mistakes come back as typed errors that name the thing, its size and the limit.

use rankmix::formats::TensorFile;
use rankmix::golden::GoldenCase;
use rankmix::graph::Gradients;
use rankmix::layers::{
    AdapterOptions, Capacity, FeedForward, GateInput, LatentMoe, Linear, Lora, Moe, MoeLora,
    RotMole, Routing, SharedExpert,
};
use rankmix::ops::{Activation, DropPolicy, Projection, Rotation};
use rankmix::train::{AdamW, GradientAccumulation};
use rankmix::{Device, DeviceOptions, Error, Graph, Init, ParameterStore, Tensor, TensorType};

/// Panics unless the error is of the kind expected and its message holds every one of these words.
macro_rules! assert_error {
    ($result:expr, $kind:pat, $($word:literal),+) => {{
        let error = $result.expect_err("this must be refused");
        assert!(matches!(error, $kind), "another kind of error: {error:?}");
        let message = error.to_string();
        $(assert!(message.contains($word), "`{message}` does not name {}", $word);)+
    }};
}

fn base() -> Linear {
    Linear::new("layer", 6, 4)
}

#[test]
fn wrong_shapes_are_refused_when_the_graph_is_built() {
    let mut graph = Graph::new();
    let a = graph
        .input("a", TensorType::f32([2, 3]))
        .expect("a name of its own");
    let b = graph
        .input("b", TensorType::f32([4, 5]))
        .expect("a name of its own");
    assert_error!(
        graph.matmul(a, b),
        Error::Shape { .. },
        "matmul",
        "[2, 3]",
        "[4, 5]"
    );
    assert_error!(graph.add(a, b), Error::Shape { .. }, "add", "broadcast");
    assert_error!(graph.reshape(a, [7]), Error::Shape { .. }, "reshape", "[7]");
    assert_error!(graph.sum(a, &[2]), Error::Shape { .. }, "axis 2");
    assert_error!(
        graph.rotate(Rotation::Planes, b, a),
        Error::Setting { .. },
        "rank = 5",
        "even"
    );
    let lora = Lora::new(base(), AdapterOptions::new(2, 4.0)).expect("a sound layer");
    assert_error!(
        lora.forward(&mut graph, a),
        Error::Shape { .. },
        "matmul",
        "[2, 3]",
        "[4, 6]"
    );
    assert_error!(
        graph.input("c", TensorType::f32([0, 3])),
        Error::Setting { .. },
        "at least 1"
    );
    assert_error!(
        graph.input("c", TensorType::f32([1 << 20, 1 << 20])),
        Error::Limit { .. },
        "2147483647"
    );
    assert_error!(
        graph.input("a", TensorType::f32([1])),
        Error::DuplicateName { .. },
        "`a`"
    );
}

#[test]
fn values_of_another_graph_are_refused() {
    let (mut one, mut other) = (Graph::new(), Graph::new());
    let foreign = other
        .input("x", TensorType::f32([2]))
        .expect("a name of its own");
    assert_error!(one.square(foreign), Error::ForeignValue { .. }, "square");
}

#[test]
fn routing_refuses_settings_that_make_no_sense() {
    let routing = Routing::new(6, 2);
    let expert = FeedForward::new(8, 5);
    let latent = |routing, groups| LatentMoe::new("layer", expert, 4, groups, routing);
    assert_error!(
        latent(routing, 4),
        Error::Setting { .. },
        "groups = 4",
        "6 experts"
    );
    assert_error!(latent(routing, 0), Error::Setting { .. }, "groups = 0");
    assert_error!(
        LatentMoe::new("layer", expert, 0, 2, routing),
        Error::Setting { .. },
        "latent = 0"
    );
    assert_error!(
        Moe::new("layer", FeedForward::new(8, 0), routing),
        Error::Setting { .. },
        "intermediate = 0"
    );
    let moe = |routing| Moe::new("layer", expert, routing);
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-45] {
        let scaled = Routing { scale, ..routing };
        assert_error!(moe(scaled), Error::Setting { .. }, "scale", "positive");
    }
    for jitter in [-0.1, 1.0, f32::NAN] {
        let jittered = Routing { jitter, ..routing };
        assert_error!(moe(jittered), Error::Setting { .. }, "jitter", "below 1");
    }
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let drop = DropPolicy::Gate;
        let capacity = Some(Capacity { factor, drop });
        let limited = Routing {
            capacity,
            ..routing
        };
        assert_error!(
            moe(limited),
            Error::Setting { .. },
            "capacity factor",
            "positive"
        );
    }
    let layer = moe(routing).expect("a sound layer");
    let shared = SharedExpert {
        intermediate: 0,
        sigmoid_gate: false,
    };
    assert_error!(
        layer.clone().with_shared(shared),
        Error::Setting { .. },
        "shared intermediate = 0"
    );
    let mut graph = Graph::new();
    let x = graph
        .input("x", TensorType::f32([3, 8]))
        .expect("a name of its own");
    let narrow = graph
        .input("narrow", TensorType::f32([3, 7]))
        .expect("a name of its own");
    let routed = layer.forward(&mut graph, x).expect("x fits");
    assert_error!(
        routed.update_selection_bias(&mut graph, 0.001),
        Error::Setting { .. },
        "selection_bias",
        "no bias"
    );
    assert_error!(
        layer.forward(&mut graph, narrow),
        Error::DuplicateName { .. },
        "layer.router",
        "[6, 8]",
        "[6, 7]"
    );
    let free = graph.route(routed.logits, 2, true).expect("2 of 6 experts");
    assert_error!(
        graph.limit_capacity(free, 6, 0, DropPolicy::Position),
        Error::Setting { .. },
        "capacity = 0"
    );
    let limited = graph
        .limit_capacity(free, 6, 1, DropPolicy::Position)
        .expect("a capacity of 1");
    assert_error!(
        graph.limit_capacity(limited, 6, 1, DropPolicy::Position),
        Error::Shape { .. },
        "limit_capacity",
        "offsets",
        "[7]"
    );
    assert_error!(
        graph.router_metrics(routed.logits, limited.segments, None),
        Error::Shape { .. },
        "router_metrics",
        "[7]"
    );
}

#[test]
fn layers_refuse_settings_that_make_no_sense() {
    let options = AdapterOptions::new(3, 6.0);
    let router = Routing::new(4, 2);
    assert_error!(
        RotMole::new(base(), options, router),
        Error::Setting { .. },
        "rank = 3",
        "even"
    );
    let odd =
        |rotation| RotMole::with_rotation(base(), options, router, rotation, GateInput::Latent);
    assert!(odd(Rotation::Givens).is_ok() && odd(Rotation::Cayley).is_ok());
    assert_error!(
        MoeLora::new(base(), options, Routing::new(4, 5)),
        Error::Setting { .. },
        "top_k = 5",
        "4 experts"
    );
    assert_error!(
        MoeLora::new(base(), options, Routing::new(4, 0)),
        Error::Setting { .. },
        "top_k = 0"
    );
    assert_error!(
        MoeLora::new(base(), options, Routing::new(0, 0)),
        Error::Setting { .. },
        "experts = 0"
    );
    assert_error!(
        Lora::new(base(), AdapterOptions::new(0, 1.0)),
        Error::Setting { .. },
        "rank = 0"
    );
    assert_error!(
        "spin".parse::<Rotation>(),
        Error::Setting { .. },
        "spin",
        "planes, givens, cayley, butterfly, householder, and brick_wall:N"
    );
    for wall in ["brick_wall", "brick_wall:", "brick_wall:0", "brick_wall:-1"] {
        assert!(
            matches!(wall.parse::<Rotation>(), Err(Error::Setting { .. })),
            "{wall}"
        );
    }
    assert_error!(
        Rotation::BrickWall { layers: 0 }.numbers(4),
        Error::Setting { .. },
        "layers = 0"
    );
    let layers = usize::MAX;
    assert_error!(
        Rotation::BrickWall { layers }.numbers(4),
        Error::Limit { .. },
        "brick_wall",
        "2147483647"
    );
    assert_error!(
        "clock".parse::<GateInput>(),
        Error::Setting { .. },
        "clock",
        "input, latent and static"
    );
    let mut graph = Graph::new();
    let logits = graph
        .input("logits", TensorType::f32([3, 4]))
        .expect("a name of its own");
    assert_error!(
        graph.route(logits, 5, true),
        Error::Setting { .. },
        "top_k = 5",
        "4 experts"
    );
}

#[test]
fn labels_and_ids_are_checked_when_they_are_written() {
    let mut graph = Graph::new();
    let logits = graph
        .input("logits", TensorType::f32([3, 4]))
        .expect("a name of its own");
    let labels = graph
        .input("labels", TensorType::i32([3]))
        .expect("a name of its own");
    let loss = graph.cross_entropy(logits, labels).expect("the shapes fit");
    graph.output(loss).expect("a value of this graph");
    let store = ParameterStore::new(&Device::cpu());
    let mut session = graph.compile(&store).expect("no parameters are needed");
    let write = |session: &mut rankmix::Session, labels: [i32; 3]| {
        session.set(
            "labels",
            &Tensor::i32([3], labels.to_vec()).expect("3 labels"),
        )
    };
    assert_error!(
        write(&mut session, [0, 4, 1]),
        Error::IndexOutOfRange { .. },
        "`labels`",
        "element 1 is 4",
        "0..4",
        "-100"
    );
    assert_error!(
        write(&mut session, [0, 1, -1]),
        Error::IndexOutOfRange { .. },
        "element 2 is -1"
    );
    assert!(write(&mut session, [0, 3, -100]).is_ok());
    assert_error!(session.run(), Error::MissingInput { .. }, "`logits`");
    let wrong = Tensor::f32([4, 3], vec![0.0; 12]).expect("12 elements");
    assert_error!(
        session.set("logits", &wrong),
        Error::TypeMismatch { .. },
        "f32[3, 4]",
        "f32[4, 3]"
    );
    assert_error!(
        session.set("logit", &wrong),
        Error::UnknownName { .. },
        "`logit`"
    );
    let right = Tensor::f32([3, 4], vec![0.0; 12]).expect("12 elements");
    session.set("logits", &right).expect("the declared shape");
    let loss = session.run_reading(&[loss]).expect("all inputs are there")[0]
        .item()
        .expect("a scalar");
    assert!((loss - 4.0_f64.ln()).abs() < 1e-6, "{loss}");
    assert_error!(
        session.read(logits),
        Error::NotKept { .. },
        "`logits`",
        "Graph::output"
    );
}

#[test]
fn a_device_that_is_not_there_is_named_with_those_that_are() {
    let open = |request: &str| {
        Device::open_with(&DeviceOptions {
            request: Some(request.to_owned()),
            checked: false,
        })
    };
    assert_error!(
        open("abacus"),
        Error::UnknownDevice { .. },
        "`abacus`",
        "cpu"
    );
    let missing = if cfg!(target_os = "macos") {
        "dx12"
    } else {
        "metal"
    };
    assert!(
        matches!(open(missing), Err(Error::NoAdapter { .. })),
        "{:?}",
        open(missing)
    );
    assert_eq!(
        open("CPU").expect("there is always a CPU").name(),
        "CPU executor (f32)"
    );
}

#[test]
fn parameters_are_checked_against_the_store() {
    let store = ParameterStore::new(&Device::cpu());
    let mut graph = Graph::new();
    let w = graph
        .parameter("w", [2, 3], Init::Provided, true)
        .expect("a name of its own");
    let loss = graph.sum_all(w).expect("floats");
    graph.output(loss).expect("a value of this graph");
    assert_error!(
        graph.compile(&store),
        Error::UnknownName { .. },
        "parameter",
        "`w`"
    );
    assert_error!(
        store.initialize(&graph, 0),
        Error::UnknownName { .. },
        "provided",
        "`w`"
    );
    store
        .insert("w", &Tensor::f32([3, 2], vec![0.0; 6]).expect("6 elements"))
        .expect("floats");
    assert_error!(
        graph.compile(&store),
        Error::TypeMismatch { .. },
        "`w`",
        "f32[2, 3]",
        "f32[3, 2]"
    );
    assert_error!(
        graph.parameter("w", [9], Init::Zeros, true),
        Error::DuplicateName { .. },
        "`w`",
        "f32[9]"
    );
    let x = graph
        .input("x", TensorType::f32([2]))
        .expect("a name of its own");
    assert_error!(graph.gradients(loss, &[x]), Error::NoPath { .. }, "`x`");
    let square = graph.square(w).expect("floats");
    assert_error!(
        graph.backward(square),
        Error::Shape { .. },
        "f32[2, 3]",
        "one float"
    );
}

#[test]
fn optimisers_refuse_constants_that_make_no_sense() {
    let mut graph = Graph::new();
    let w = graph
        .parameter("w", [2], Init::Ones, true)
        .expect("a name of its own");
    let loss = graph.sum_all(w).expect("floats");
    let gradients = graph.backward(loss).expect("a scalar");
    let mut adamw = AdamW::default();
    adamw.constants.beta2 = 1.0;
    assert_error!(
        adamw.add_to(&mut graph, &gradients),
        Error::Setting { .. },
        "beta2 = 1"
    );
    let adamw = AdamW {
        max_norm: Some(0.0),
        ..AdamW::default()
    };
    assert_error!(
        adamw.add_to(&mut graph, &gradients),
        Error::Setting { .. },
        "max_norm = 0"
    );
}

#[test]
fn reading_a_parameter_after_its_update_is_refused() {
    let mut graph = Graph::new();
    let w = graph
        .parameter("w", [2], Init::Ones, true)
        .expect("a name of its own");
    let square = graph.square(w).expect("floats");
    let loss = graph.sum_all(square).expect("floats");
    let gradients = graph.backward(loss).expect("a scalar");
    AdamW::default()
        .add_to(&mut graph, &gradients)
        .expect("sound constants");
    let late = graph.sum_all(w).expect("floats");
    graph.output(late).expect("a value of this graph");
    let store = ParameterStore::new(&Device::cpu());
    store
        .initialize(&graph, 0)
        .expect("all parameters start somewhere");
    assert_error!(
        graph.compile(&store),
        Error::Shape { .. },
        "`w`",
        "after an update"
    );
}

#[test]
fn a_view_of_a_parameter_is_as_old_as_the_parameter() {
    let mut graph = Graph::new();
    let p = graph
        .parameter("p", [2, 3], Init::Zeros, false)
        .expect("a name of its own");
    let view = graph.reshape(p, [6]).expect("six elements");
    let x = graph
        .input("x", TensorType::f32([2, 3]))
        .expect("a name of its own");
    graph.assign(p, x).expect("p is a parameter");
    let late = graph.scale(view, 1.0).expect("floats");
    graph.output(late).expect("a value of the graph");
    let store = ParameterStore::new(&Device::cpu());
    store.initialize(&graph, 0).expect("the CPU has memory");
    assert_error!(
        graph.compile(&store),
        Error::Shape { .. },
        "after an update"
    );
}

#[test]
fn what_a_session_does_not_know_is_refused() {
    let mut graph = Graph::new();
    let x = graph
        .input("x", TensorType::f32([2]))
        .expect("a name of its own");
    let y = graph.scale(x, 2.0).expect("floats");
    graph.output(y).expect("a value of the graph");
    let store = ParameterStore::new(&Device::cpu());
    let mut session = graph.compile(&store).expect("a sound graph");
    let late = graph.scale(y, 2.0).expect("floats");
    assert_error!(session.read(late), Error::NotKept { .. }, "added");
    assert_error!(session.storage(late), Error::NotKept { .. }, "added");
    assert_error!(
        session.write(late, &Tensor::scalar(0.0)),
        Error::NotKept { .. },
        "added"
    );
    assert_error!(session.run(), Error::MissingInput { .. }, "the input `x`");

    let w = graph
        .parameter("w", [2], Init::Zeros, true)
        .expect("a name of its own");
    let loss = graph.sum_all(w).expect("floats");
    let gradients = graph.backward(loss).expect("a sum has a gradient");
    let mut other = Graph::new();
    assert_error!(
        AdamW::default().add_to(&mut other, &gradients),
        Error::ForeignValue { .. },
        "another graph"
    );
    assert!(other.parameters().is_empty(), "moments of a refused step");
}

#[test]
fn groups_are_of_the_experts_that_were_chosen() {
    let mut graph = Graph::new();
    let logits = graph
        .input("logits", TensorType::f32([6, 8]))
        .expect("a name of its own");
    let routed = graph.route(logits, 3, true).expect("3 of 8");
    assert_error!(
        graph.active_groups(routed.segments, 4, 2),
        Error::Shape { .. },
        "8 experts",
        "expected 4"
    );
    let groups = graph
        .active_groups(routed.segments, 8, 4)
        .expect("2 experts a group");
    let x = graph
        .input("x", TensorType::f32([6, 5]))
        .expect("a name of its own");
    let weight = graph
        .input("weight", TensorType::f32([8, 7, 5]))
        .expect("a name of its own");
    let projection = Projection { x, weight };
    assert_error!(
        graph.gated_experts(
            Activation::Silu,
            projection,
            None,
            routed.segments,
            Some(&groups)
        ),
        Error::Shape { .. },
        "6 rows",
        "expected 3"
    );
}

#[test]
fn a_recomputed_segment_cannot_update_parameters() {
    let mut graph = Graph::new();
    let w = graph
        .parameter("w", [2], Init::Ones, true)
        .expect("a name of its own");
    let updated = graph.recompute(|graph| {
        graph.recompute(|graph| graph.square(w))?;
        let loss = graph.sum_all(w)?;
        let gradients = graph.backward(loss)?;
        AdamW::default().add_to(graph, &gradients)
    });
    assert_error!(updated, Error::Shape { .. }, "adamw", "recomputed segment");
    // Outside of it, the one that failed included, updates are as allowed as before.
    let loss = graph.sum_all(w).expect("a sum");
    let gradients = graph.backward(loss).expect("gradients of a sum");
    let schedule = graph
        .named("adamw.schedule")
        .expect("the optimiser has declared it");
    let moments = ["adamw.first.w", "adamw.second.w"]
        .map(|name| graph.named(name).expect("the optimiser has declared it"));
    graph
        .adamw_step(
            w,
            moments,
            gradients.pairs()[0].1,
            schedule,
            None,
            AdamW::default().constants,
        )
        .expect("an update outside of a segment");
}

#[test]
fn gradients_are_not_accumulated_by_mistake() {
    assert_error!(
        GradientAccumulation::new(0),
        Error::Setting { .. },
        "micro_batches = 0"
    );
    let accumulation = GradientAccumulation::new(3).expect("at least one micro-batch");
    let mut graph = Graph::new();
    let w = graph
        .parameter("w", [2], Init::Ones, true)
        .expect("a name of its own");
    let loss = graph.sum_all(w).expect("floats");
    assert_error!(
        accumulation.add_to(&mut graph, &Gradients::default()),
        Error::Setting { .. },
        "gradients"
    );
    let of_a_loss = Gradients::from_pairs(vec![(loss, loss)]);
    assert_error!(
        accumulation.add_to(&mut graph, &of_a_loss),
        Error::Setting { .. },
        "only parameters"
    );
    assert_error!(
        graph.accumulate_into(loss, loss, 1.0),
        Error::Shape { .. },
        "accumulate",
        "only parameters"
    );
    assert_error!(
        graph.clear(loss),
        Error::Shape { .. },
        "clear",
        "only parameters"
    );
    let gradients = graph.backward(loss).expect("a scalar");
    let accumulated = accumulation
        .add_to(&mut graph, &gradients)
        .expect("gradients of parameters");
    assert_error!(
        accumulation.add_to(&mut graph, &gradients),
        Error::Shape { .. },
        "accumulated.w"
    );
    // The update trains what the micro-batches have: it starts nothing of its own.
    let store = ParameterStore::new(&Device::cpu());
    assert_error!(
        accumulated.compile(&AdamW::default(), &store),
        Error::UnknownName { .. },
        "`w`"
    );
    store
        .initialize(&graph, 0)
        .expect("all parameters start somewhere");
    let mut update = accumulated
        .compile(&AdamW::default(), &store)
        .expect("the store has all parameters");
    assert_error!(
        update.resume_at(0, 3),
        Error::Setting { .. },
        "micro_batches_done = 3",
        "3 make a step"
    );
}

#[test]
fn damaged_files_are_refused_and_failed_writes_leave_the_old_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("x.safetensors");
    assert!(matches!(TensorFile::read(&path), Err(Error::File { .. })));
    let mut file = TensorFile::default();
    file.tensors.insert(
        "a".to_owned(),
        Tensor::f32([2, 3], vec![1.0; 6]).expect("6 elements"),
    );
    file.write(&path).expect("the folder can be written to");
    assert_eq!(TensorFile::read(&path).expect("it was just written"), file);
    let bytes = std::fs::read(&path).expect("it was just written");
    for end in [0, 4, 8, 20, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..end]).expect("the folder can be written to");
        assert!(
            matches!(TensorFile::read(&path), Err(Error::Format { .. })),
            "cut off at {end}"
        );
    }
    std::fs::write(&path, [0xff; 64]).expect("the folder can be written to");
    assert!(
        matches!(TensorFile::read(&path), Err(Error::Format { .. })),
        "a lying header"
    );
    std::fs::write(&path, &bytes).expect("the folder can be written to");
    assert_error!(
        GoldenCase::read(&path),
        Error::Format { .. },
        "x.safetensors",
        "layer"
    );
    let missing = folder.path().join("no/such/folder/x.safetensors");
    assert!(matches!(file.write(missing), Err(Error::File { .. })));
    assert_eq!(TensorFile::read(&path).expect("it is as it was"), file);

    let store = ParameterStore::new(&Device::cpu());
    store
        .insert("a", &Tensor::f32([3, 2], vec![5.0; 6]).expect("6 elements"))
        .expect("floats");
    assert_error!(
        store.load(&path),
        Error::TypeMismatch { .. },
        "`a`",
        "[3, 2]",
        "[2, 3]"
    );
    assert_eq!(store.read("a").expect("it is there").to_f32(), [5.0; 6]);
}
