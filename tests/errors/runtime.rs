//! Graphs, devices, stores, sessions, files.

use rankmix::formats::TensorFile;
use rankmix::golden::GoldenCase;
use rankmix::layers::{AdapterOptions, Lora};
use rankmix::ops::Rotation;
use rankmix::train::AdamW;
use rankmix::{Device, DeviceOptions, Error, Graph, Init, ParameterStore, Tensor, TensorType};

use crate::base;

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
            ..DeviceOptions::default()
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
fn parameters_are_shared_between_stores_of_one_device() {
    let (base, adapter) = (
        ParameterStore::new(&Device::cpu()),
        ParameterStore::new(&Device::cpu()),
    );
    let numbers = |x: f32| Tensor::f32([2], vec![x; 2]).expect("2 elements");
    base.insert("w", &numbers(1.0)).expect("floats");
    adapter.share("w", &base).expect("the base has it");
    base.insert("w", &numbers(2.0)).expect("floats");
    assert_eq!(adapter.read("w").expect("it is shared").to_f32(), [2.0; 2]);
    adapter.insert("w", &numbers(3.0)).expect("floats");
    assert_eq!(base.read("w").expect("it is there").to_f32(), [3.0; 2]);
    assert_error!(
        adapter.share("w", &base),
        Error::DuplicateName { .. },
        "`w`",
        "this store"
    );
    assert_error!(
        adapter.share("v", &base),
        Error::UnknownName { .. },
        "parameter",
        "`v`"
    );
    let elsewhere = ParameterStore::new(&Device::reference());
    assert_error!(
        elsewhere.share("w", &base),
        Error::Setting { .. },
        "parameter = w",
        "same device"
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
