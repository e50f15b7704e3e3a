//! Routing and layers.

use rankmix::layers::{
    AdapterOptions, Capacity, FeedForward, GateInput, LatentMoe, Lora, Moe, MoeLora, RotMole,
    Routing, SharedExpert,
};
use rankmix::ops::{Activation, DropPolicy, Projection, Rotation};
use rankmix::{Error, Graph, TensorType};

use crate::base;

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
