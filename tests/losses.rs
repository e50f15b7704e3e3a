//! What the losses and norms promise beyond their gradients, as far as no device is needed.

use rankmix::{Device, Error, Graph, ParameterStore, Result, Tensor, TensorType, Value};

#[test]
fn an_expert_out_of_range_is_an_error_that_names_it() -> Result<()> {
    let mut graph = Graph::new();
    let logits = graph.input("logits", TensorType::f32([2, 4]))?;
    let experts = graph.input("experts", TensorType::i32([2, 1]))?;
    let loss = graph.balance_loss(logits, experts)?.loss;
    graph.output(loss)?;
    let mut session = graph.compile(&ParameterStore::new(&Device::reference()))?;
    for bad in [4, -1, -100] {
        let error = session.set("experts", &Tensor::i32([2, 1], vec![0, bad])?);
        let named = matches!(&error, Err(Error::IndexOutOfRange { name, limit: 4, ignored: None, .. }) if name.contains("experts"));
        assert!(named, "the expert {bad} gave {error:?}");
    }
    Ok(())
}

#[test]
fn the_load_has_no_gradient() -> Result<()> {
    let mut graph = Graph::new();
    let logits = graph.input("logits", TensorType::f32([3, 4]))?;
    let experts = graph.input("experts", TensorType::i32([3, 1]))?;
    let load = graph.balance_loss(logits, experts)?.load;
    let sum = graph.sum_all(load)?;
    assert!(matches!(
        graph.gradients(sum, &[logits]),
        Err(Error::NoPath { .. })
    ));
    Ok(())
}

#[test]
fn gradients_that_nobody_wants_are_not_computed() -> Result<()> {
    for (x_wanted, weight_wanted) in [(true, false), (false, true), (true, true)] {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([4, 6]))?;
        let weight = graph.input("weight", TensorType::f32([6]))?;
        let y = graph.rms_norm(x, weight, 1e-5)?;
        let loss = graph.sum_all(y)?;
        let wanted: Vec<Value> = [(x, x_wanted), (weight, weight_wanted)]
            .into_iter()
            .filter_map(|(v, on)| on.then_some(v))
            .collect();
        graph.gradients(loss, &wanted)?;
        let text = graph.to_string();
        assert_eq!(text.contains("rms_norm_input_gradient"), x_wanted, "{text}");
        assert_eq!(
            text.contains("rms_norm_weight_gradient"),
            weight_wanted,
            "{text}"
        );
    }
    Ok(())
}

#[test]
fn an_epsilon_that_is_not_positive_is_an_error() -> Result<()> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([4, 6]))?;
    let weight = graph.input("weight", TensorType::f32([6]))?;
    for epsilon in [0.0, -1e-5, f32::NAN, f32::INFINITY, 1e-40] {
        let found = graph.rms_norm(x, weight, epsilon);
        assert!(
            matches!(
                found,
                Err(Error::Setting {
                    setting: "epsilon",
                    ..
                })
            ),
            "{epsilon}: {found:?}"
        );
    }
    Ok(())
}

#[test]
fn operands_that_do_not_fit_are_errors() -> Result<()> {
    let mut graph = Graph::new();
    let matrix = graph.input("matrix", TensorType::f32([3, 4]))?;
    let vector = graph.input("vector", TensorType::f32([3]))?;
    let cube = graph.input("cube", TensorType::f32([3, 4, 1]))?;
    let integers = graph.input("integers", TensorType::i32([3, 4]))?;
    let labels = graph.input("labels", TensorType::i32([3]))?;
    let too_many = graph.input("too many", TensorType::i32([4]))?;
    let too_many_rows = graph.input("too many rows", TensorType::i32([4, 2]))?;
    let found = [
        graph.silu(integers),
        graph.rms_norm(matrix, vector, 1e-5),
        graph.rms_norm(vector, vector, 1e-5),
        graph.rms_norm(integers, vector, 1e-5),
        graph.cross_entropy(matrix, too_many),
        graph.cross_entropy(matrix, integers),
        graph.cross_entropy(matrix, vector),
        graph.cross_entropy(cube, labels),
        graph.cross_entropy(integers, labels),
        graph
            .balance_loss(matrix, labels)
            .map(|balance| balance.loss),
        graph
            .balance_loss(matrix, too_many_rows)
            .map(|balance| balance.loss),
        graph
            .balance_loss(matrix, matrix)
            .map(|balance| balance.loss),
        graph
            .balance_loss(vector, integers)
            .map(|balance| balance.loss),
        graph.z_loss(vector),
        graph.z_loss(cube),
        graph.z_loss(integers),
    ];
    for (number, found) in found.iter().enumerate() {
        assert!(
            matches!(found, Err(Error::Shape { .. })),
            "call {number}: {found:?}"
        );
    }
    Ok(())
}
