//! A converted layer beside its source, on the CPU.

use rankmix::convert::{LatentOptions, convert_layer};
use rankmix::formats::{LatentDown, LatentExperts, MoeExperts, MoeLayout};
use rankmix::layers::{FeedForward, LatentMoe, Moe, Routing};
use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType};

use crate::random::{Random, random_experts};

const TOKENS: usize = 20;

fn run(
    tokens: &Tensor,
    router: &Tensor,
    build: impl Fn(&mut Graph, rankmix::Value) -> rankmix::Result<rankmix::layers::RoutedOutput>,
    parameters: &[(&str, &Tensor)],
) -> rankmix::Result<Vec<f64>> {
    let device = Device::cpu();
    let mut graph = Graph::new();
    let dims = tokens.shape().dims();
    let x = graph.input("x", TensorType::f32([dims[0], dims[1]]))?;
    let output = build(&mut graph, x)?.output;
    graph.output(output)?;
    let store = ParameterStore::new(&device);
    store.initialize(&graph, 1)?;
    store.insert("moe.router", router)?;
    for (name, tensor) in parameters {
        store.insert(name, tensor)?;
    }
    let mut session = graph.compile(&store)?;
    session.set("x", tokens)?;
    Ok(session.run_reading(&[output])?[0].to_f64())
}

fn source(experts: &MoeExperts, tokens: &Tensor, router: &Tensor) -> Vec<f64> {
    let [e, m, n] = experts.extents().expect("they fit");
    let layer = Moe::new("moe", FeedForward::new(n, m), Routing::new(e, 2)).expect("it fits");
    run(
        tokens,
        router,
        |graph, x| layer.forward(graph, x),
        &[
            ("moe.gate", &experts.gate),
            ("moe.up", &experts.up),
            ("moe.down", &experts.down),
        ],
    )
    .expect("it runs")
}

fn converted(latent: &LatentExperts, tokens: &Tensor, router: &Tensor) -> Vec<f64> {
    let [e, g, l, m, n] = latent.extents().expect("they fit");
    let mut layer =
        LatentMoe::new("moe", FeedForward::new(n, m), l, g, Routing::new(e, 2)).expect("it fits");
    let mut parameters = vec![
        ("moe.gate_latent", &latent.gate_latent),
        ("moe.up_latent", &latent.up_latent),
        ("moe.gate_expert", &latent.gate_expert),
        ("moe.up_expert", &latent.up_expert),
    ];
    match &latent.down {
        LatentDown::Whole(down) => parameters.push(("moe.down", down)),
        LatentDown::Factored { latent, expert } => {
            layer = layer.with_factored_down();
            parameters.extend([("moe.down_latent", latent), ("moe.down_expert", expert)]);
        }
    }
    run(
        tokens,
        router,
        |graph, x| layer.forward(graph, x),
        &parameters,
    )
    .expect("it runs")
}

#[test]
fn at_full_latent_width_the_converted_layer_gives_what_the_source_gives() {
    let (e, m, n) = (6, 10, 16);
    let mut random = Random::new(3);
    let mut matrix = |rows, columns| {
        let data = random
            .matrix(rows, columns)
            .iter()
            .map(|&x| x as f32)
            .collect();
        Tensor::f32([rows, columns], data).expect("the shape fits")
    };
    let (tokens, router) = (matrix(TOKENS, n), matrix(e, n));
    let experts = random_experts(4, [e, m, n]);
    let expected = source(&experts, &tokens, &router);
    let largest = expected.iter().fold(0.0_f64, |l, x| l.max(x.abs()));
    for factored_down in [false, true] {
        let options = |latent| LatentOptions {
            factored_down,
            ..LatentOptions::new(3, latent)
        };
        let (latent, report) = convert_layer(&experts, None, &options(n)).expect("it converts");
        assert!(report.errors.whole.unweighted < 1e-6);
        let found = converted(&latent, &tokens, &router);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 1e-5 * largest,
                "{found} is not {expected}"
            );
        }
        // Two dimensions less are seen in the output.
        let (latent, _) = convert_layer(&experts, None, &options(n - 2)).expect("it converts");
        let found = converted(&latent, &tokens, &router);
        let worst = found
            .iter()
            .zip(&expected)
            .map(|(found, expected)| (found - expected).abs())
            .fold(0.0, f64::max);
        assert!(worst > 1e-3 * largest, "{worst} of {largest}");
    }
}

#[test]
fn matrices_are_named_in_each_layout_whatever_their_elements_are_of() {
    let wide =
        |tensor: &Tensor| Tensor::f64(tensor.shape(), tensor.to_f64()).expect("the same shape");
    let experts = random_experts(5, [3, 4, 6]);
    let other = MoeExperts {
        gate: wide(&experts.gate),
        up: wide(&experts.up),
        down: wide(&experts.down),
    };
    for (layout, last) in [
        (MoeLayout::Mixtral, "w2.weight"),
        (MoeLayout::PerExpert, "down_proj.weight"),
    ] {
        let named = experts.named("a.b", layout).expect("it fits");
        assert_eq!(named, other.named("a.b", layout).expect("it fits"));
        assert_eq!(named.len(), 9);
        let down = &named[8];
        assert_eq!(down.name, format!("a.b.experts.2.{last}"));
        assert_eq!(down.shape, [6, 4]);
        assert_eq!(down.elements[..], experts.down.to_f32()[2 * 24..]);
    }
    assert!(experts.named("a.b", MoeLayout::Fused).is_err());

    let options = LatentOptions::new(1, 4);
    let (latent, _) = convert_layer(&experts, None, &options).expect("it converts");
    let other = LatentExperts {
        up_latent: wide(&latent.up_latent),
        gate_expert: wide(&latent.gate_expert),
        ..latent.clone()
    };
    let named = latent.named("a.b").expect("it fits");
    assert_eq!(named, other.named("a.b").expect("it fits"));
    assert_eq!(named[4].name, "a.b.experts.2.gate_expert.weight");
    assert_eq!(named[4].elements[..], latent.gate_expert.to_f32()[2 * 16..]);
}
