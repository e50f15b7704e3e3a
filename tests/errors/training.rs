//! Optimisers, accumulation, updates of parameters.

use rankmix::graph::Gradients;
use rankmix::train::{AdamW, GradientAccumulation};
use rankmix::{Device, Error, Graph, Init, ParameterStore, TensorType};

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
