//! MoE and latent MoE layers of random shapes and options against the f64 reference.

use libtest_mimic::{Failed, Trial};
use proptest::option;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::select;
use rankmix::layers::{Capacity, FeedForward, LatentMoe, Moe, RoutedOutput, Routing, SharedExpert};
use rankmix::ops::{Activation, BalanceForm, DropPolicy, Score};
use rankmix::{Device, Graph, ParameterStore, Result, Tensor, TensorType, Value};

use crate::case::{floats, floats_in};
use crate::metrics::relative_errors;
use crate::popularity::{Popularity, router, rows};
use crate::{devices, random};

/// What makes a layer latent.
#[derive(Clone, Copy, Debug)]
struct Latent {
    width: usize,
    groups: usize,
    factored_down: bool,
}

/// A layer of any shape with any options.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    expert: FeedForward,
    latent: Option<Latent>,
    routing: Routing,
    shared: Option<SharedExpert>,
    popularity: Popularity,
}

impl Shape {
    fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        match self.latent {
            None => {
                let mut layer = Moe::new("layer", self.expert, self.routing)?;
                layer.shared = self.shared;
                layer.forward(graph, x)
            }
            Some(Latent {
                width,
                groups,
                factored_down,
            }) => {
                let mut layer = LatentMoe::new("layer", self.expert, width, groups, self.routing)?;
                (layer.shared, layer.factored_down) = (self.shared, factored_down);
                layer.forward(graph, x)
            }
        }
    }

    fn input(&self) -> Tensor {
        let Routing { experts, top_k, .. } = self.routing;
        rows(
            self.popularity,
            [self.tokens, self.expert.hidden],
            top_k,
            experts,
        )
    }

    /// Output, experts, metrics, and all gradients; and whether a second run is equal bit for bit.
    fn run(&self, device: &Device) -> Result<(Vec<(String, Tensor)>, bool)> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([self.tokens, self.expert.hidden]))?;
        let routed = self.forward(&mut graph, x)?;
        let metrics = routed.metrics(&mut graph)?;
        let auxiliary = routed.auxiliary_loss(&mut graph, 0.5, 0.125)?;
        let upstream = graph.constant(floats(&[self.tokens, self.expert.hidden], 402))?;
        let one = graph.constant(Tensor::scalar(1.0))?;
        let parameters: Vec<String> = graph
            .parameters()
            .iter()
            .map(|spec| spec.name.clone())
            .collect();
        let wanted: Vec<String> = parameters
            .iter()
            .filter(|name| !name.ends_with("router_bias"))
            .chain([&"x".to_owned()])
            .cloned()
            .collect();
        let values = wanted
            .iter()
            .map(|name| graph.named(name))
            .collect::<Result<Vec<Value>>>()?;
        let seeds = [(routed.output, upstream), (auxiliary, one)];
        let gradients = graph.gradients_from(&seeds, &values)?;
        let mut results = vec![
            ("output".to_owned(), routed.output),
            ("experts".to_owned(), routed.routed.experts()),
            ("counts".to_owned(), metrics.counts),
            ("dropped".to_owned(), metrics.dropped),
            ("entropy".to_owned(), metrics.entropy),
        ];
        let names = wanted.iter().map(|name| format!("gradient of {name}"));
        results.extend(names.zip(gradients));
        let store = ParameterStore::new(device);
        for (seed, name) in parameters.iter().enumerate() {
            let dims = graph.ty(graph.named(name)?)?.dims().to_vec();
            let unit = 1.7 / (*dims.last().unwrap_or(&1) as f64).sqrt();
            let tensor = match name.as_str() {
                "layer.router" => router(self.routing.experts, self.expert.hidden),
                "layer.router_bias" => floats_in(&dims, 403, -0.2, 0.2),
                _ => floats_in(&dims, 404 + seed as u64, -unit, unit),
            };
            store.insert(name, &tensor)?;
        }
        for &(_, value) in &results {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.write(x, &self.input())?;
        let values: Vec<Value> = results.iter().map(|&(_, value)| value).collect();
        let tensors = session.run_reading(&values)?;
        let again = session.run_reading(&values)? == tensors;
        let results = results.into_iter().map(|(name, _)| name).zip(tensors);
        Ok((results.collect(), again))
    }
}

fn routings() -> impl Strategy<Value = Routing> {
    let sizes = (1..65_usize, 1..9_usize);
    let options = (
        any::<bool>(),
        select(vec![Score::Softmax, Score::Sigmoid]),
        any::<bool>(),
        select(vec![BalanceForm::Switch, BalanceForm::HuggingFace]),
        select(vec![1.0_f32, 2.5]),
    );
    let capacity = option::of((
        select(vec![0.25, 0.5, 1.0, 1.25]),
        select(vec![DropPolicy::Position, DropPolicy::Gate]),
    ));
    (sizes, options, capacity).prop_map(|((experts, top_k), options, capacity)| {
        let (renormalize, score, selection_bias, balance, scale) = options;
        Routing {
            renormalize,
            score,
            selection_bias,
            balance,
            scale,
            capacity: capacity.map(|(factor, drop)| Capacity { factor, drop }),
            ..Routing::new(experts, top_k.min(experts))
        }
    })
}

fn shapes(latent: bool) -> impl Strategy<Value = Shape> {
    let tokens = prop_oneof![Just(1_usize), 2..8_usize, 8..201_usize];
    let widths = (
        1..40_usize,
        prop_oneof![1..40_usize, 65..90_usize],
        1..30_usize,
    );
    let kinds = (
        select(Activation::ALL.to_vec()),
        prop_oneof![3 => Just(true), 1 => Just(false)],
        any::<bool>(),
        any::<proptest::sample::Index>(),
    );
    let shared = option::of((1..30_usize, any::<bool>()));
    let popularity = select(Popularity::ALL.to_vec());
    (tokens, widths, kinds, routings(), shared, popularity).prop_map(
        move |(tokens, widths, kinds, routing, shared, popularity)| {
            let (beyond, intermediate, width) = widths;
            let (activation, gated, factored_down, group) = kinds;
            let divisors: Vec<usize> = (1..=routing.experts)
                .filter(|&groups| routing.experts.is_multiple_of(groups))
                .collect();
            Shape {
                tokens,
                expert: FeedForward {
                    activation,
                    gated,
                    // A coordinate for each expert, and some more.
                    ..FeedForward::new(routing.experts + beyond - 1, intermediate)
                },
                latent: latent.then(|| Latent {
                    width,
                    groups: *group.get(&divisors),
                    factored_down,
                }),
                routing,
                shared: shared.map(|(intermediate, sigmoid_gate)| SharedExpert {
                    intermediate,
                    sigmoid_gate,
                }),
                popularity,
            }
        },
    )
}

/// Compares a layer with the f64 reference: the same experts, every result within the tolerances.
fn matches_reference(device: &Device, shape: &Shape) -> Result<(), String> {
    let (want, _) = shape
        .run(&Device::reference())
        .map_err(|error| error.to_string())?;
    let (got, again) = shape.run(device).map_err(|error| error.to_string())?;
    if !again {
        return Err(format!("{shape:?}: a second run is not equal bit for bit"));
    }
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        if got.as_i32().is_some() {
            if got != want {
                return Err(format!("{shape:?}: the {name} differ"));
            }
            continue;
        }
        let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
        // With few tokens the router's gradient is a difference of nearly equal numbers that nothing averages out.
        let slack = if name.ends_with(".router") && shape.tokens < 8 {
            20.0
        } else {
            1.0
        };
        if norm > slack * 1e-5 || largest > slack * 1e-4 {
            return Err(format!(
                "{shape:?}, {name}: {norm:.2e} in norm, {largest:.2e} of the largest"
            ));
        }
    }
    Ok(())
}

fn random_shapes(device: &Device, latent: bool, cases: u32) -> Result<(), Failed> {
    random::holds("moe_shapes", cases, shapes(latent), |shape| {
        matches_reference(device, shape)
    })
}

/// The ends of what there is.
fn extremes(device: &Device, latent: bool) -> Result<(), Failed> {
    for (tokens, experts, top_k, popularity) in [
        (1, 1, 1, Popularity::Uniform),
        (1, 64, 8, Popularity::Distinct),
        (133, 64, 8, Popularity::Zipf),
        (70, 5, 5, Popularity::Identical),
        (200, 8, 1, Popularity::Identical),
        (64, 16, 2, Popularity::Skewed),
    ] {
        let shape = Shape {
            tokens,
            expert: FeedForward::new(experts + 6, 72),
            latent: latent.then_some(Latent {
                width: 24,
                groups: if experts % 4 == 0 { experts / 4 } else { 1 },
                factored_down: tokens > 100,
            }),
            routing: Routing::new(experts, top_k),
            shared: None,
            popularity,
        };
        matches_reference(device, &shape)?;
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, latent) in [("moe", false), ("latent_moe", true)] {
        trials.extend(devices::trials(
            &format!("layers::{name}_of_extreme_shapes"),
            move |device| extremes(device, latent),
        ));
        trials.extend(devices::trials(
            &format!("layers::{name}_of_random_shapes"),
            move |device| {
                // A new shape is a new set of pipelines: on a GPU half a second each.
                let cases = if device.adapter().is_some() { 12 } else { 150 };
                random_shapes(device, latent, cases)
            },
        ));
    }
    trials
}
