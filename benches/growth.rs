//! How the cost of the mixtures grows: linear in the tokens T, flat in the experts E at fixed k, linear in k.
//!
//! Times every kernel of a layer's forward and backward pass by the adapter's timestamps, groups them by shader, and fits time ~ axis^a by
//! least squares on the logarithms of the medians. Where there are no timestamps (the CPU, GL), whole runs are timed.
//! Fixed costs of a launch pull the exponents of small kernels down; compare within a row, not between rows: with a software driver
//! the same kernel can run at half its speed when others are compiled beside it.
//! `cargo bench --bench growth` prints the table, `-- --test` runs every session once; `RANKMIX_DEVICE` picks the device.

use std::collections::BTreeMap;
use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rankmix::layers::{AdapterOptions, FeedForward, Linear, Moe, MoeLora, RotMole, Routing};
use rankmix::{Device, Graph, ParameterStore, Result, Session, Tensor, TensorType};

const WIDTH: usize = 256;
const RANK: usize = 16;
/// Width inside a feed-forward expert.
const INTERMEDIATE: usize = 64;
const SAMPLES: usize = 15;

/// A point of an axis: tokens, experts, experts a token takes.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    experts: usize,
    top_k: usize,
}

const BASE: Sizes = Sizes {
    tokens: 512,
    experts: 16,
    top_k: 2,
};

struct Axis {
    name: &'static str,
    values: &'static [usize],
    at: fn(usize) -> Sizes,
}

const AXES: [Axis; 3] = [
    Axis {
        name: "T",
        values: &[128, 256, 512, 1024, 2048],
        at: |tokens| Sizes { tokens, ..BASE },
    },
    Axis {
        name: "E",
        values: &[4, 8, 16, 32, 64],
        at: |experts| Sizes { experts, ..BASE },
    },
    Axis {
        name: "k",
        values: &[1, 2, 4, 8],
        at: |top_k| Sizes { top_k, ..BASE },
    },
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    MoeLora,
    RotMole,
    Moe,
}

impl Layer {
    fn name(self) -> &'static str {
        match self {
            Self::MoeLora => "moe_lora",
            Self::RotMole => "rotmole",
            Self::Moe => "moe",
        }
    }

    /// Forward and backward, the gradient of the input included.
    fn session(self, device: &Device, sizes: Sizes) -> Result<Session> {
        let mut graph = Graph::new();
        let ty = TensorType::f32([sizes.tokens, WIDTH]);
        let x = graph.input("x", ty.clone())?;
        let upstream = graph.input("upstream", ty)?;
        let base = Linear::new("layer", WIDTH, WIDTH);
        let options = AdapterOptions::new(RANK, 32.0);
        let router = Routing::new(sizes.experts, sizes.top_k);
        let output = match self {
            Self::MoeLora => MoeLora::new(base, options, router)?.forward(&mut graph, x)?,
            Self::RotMole => RotMole::new(base, options, router)?.forward(&mut graph, x)?,
            Self::Moe => {
                let expert = FeedForward::new(WIDTH, INTERMEDIATE);
                Moe::new("layer", expert, router)?.forward(&mut graph, x)?
            }
        }
        .output;
        let wanted: Vec<_> = [x].into_iter().chain(graph.trainable()).collect();
        let gradients = graph.gradients_from(&[(output, upstream)], &wanted)?;
        for value in gradients.into_iter().chain([output]) {
            graph.output(value)?;
        }
        let store = ParameterStore::new(device);
        store.initialize(&graph, 1)?;
        let mut session = graph.compile(&store)?;
        // Random rows, so that the router spreads them over all experts.
        session.write(x, &uniform(sizes.tokens, 2)?)?;
        session.write(upstream, &uniform(sizes.tokens, 3)?)?;
        Ok(session)
    }
}

fn uniform(tokens: usize, seed: u64) -> Result<Tensor> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut unit = || generator.next_u32() as f32 / u32::MAX as f32 - 0.5;
    Tensor::f32(
        [tokens, WIDTH],
        (0..tokens * WIDTH).map(|_| unit()).collect(),
    )
}

/// Seconds of one run: in all, of everything but matrix products (the adapter without the base and the router), and of each shader.
fn sample(session: &mut Session, timestamps: bool) -> Result<BTreeMap<String, f64>> {
    let mut seconds = BTreeMap::new();
    if !timestamps {
        let start = Instant::now();
        session.run()?;
        session.device().wait()?;
        seconds.insert("all".to_owned(), start.elapsed().as_secs_f64());
        return Ok(seconds);
    }
    for timing in session.profile()? {
        let shader = timing.kernel.split("::").next().unwrap_or("").to_owned();
        let mut add = |group: &str| {
            *seconds.entry(group.to_owned()).or_insert(0.0) += timing.seconds;
        };
        add("all");
        if shader != "matmul" {
            add("all_but_matmul");
        }
        add(&shader);
    }
    Ok(seconds)
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// The slope of ln y over ln x by least squares.
fn exponent(points: &[(usize, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points
        .iter()
        .map(|&(x, y)| ((x as f64).ln(), y.ln()))
        .collect();
    let count = logs.len() as f64;
    let (mean_x, mean_y) = (
        logs.iter().map(|(x, _)| x).sum::<f64>() / count,
        logs.iter().map(|(_, y)| y).sum::<f64>() / count,
    );
    let covariance: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    covariance / variance
}

/// What the exponent should be, by counting multiply-adds and bytes.
fn expected(group: &str, axis: &str) -> &'static str {
    match (axis, group) {
        // Logits of all experts are computed, read and given gradients, and E gradient matrices are written; the gates read all
        // logits once, and then k. What holds one of these is between the two.
        ("E", "route" | "matmul" | "segment_outer" | "all" | "all_but_matmul")
        | ("k", "route" | "all") => "0 to 1",
        ("E", _) | ("k", "matmul") => "0",
        _ => "1",
    }
}

fn run(device: &Device, layer: Layer, axis: &Axis, samples: usize) -> Result<()> {
    let timestamps = device
        .adapter()
        .is_some_and(|adapter| adapter.capabilities.timestamps);
    let mut sessions = axis
        .values
        .iter()
        .map(|&value| layer.session(device, (axis.at)(value)))
        .collect::<Result<Vec<_>>>()?;
    for session in &mut sessions {
        session.run()?;
        session.device().wait()?;
    }
    // Interleaved, so that a machine that slows down slows all points down.
    let mut times: BTreeMap<String, Vec<Vec<f64>>> = BTreeMap::new();
    for _ in 0..samples {
        for (point, session) in sessions.iter_mut().enumerate() {
            for (group, seconds) in sample(session, timestamps)? {
                times
                    .entry(group)
                    .or_insert_with(|| vec![Vec::new(); axis.values.len()])[point]
                    .push(seconds);
            }
        }
    }
    for (group, mut samples) in times {
        let medians: Vec<f64> = samples.iter_mut().map(|samples| median(samples)).collect();
        let points: Vec<(usize, f64)> = axis.values.iter().copied().zip(medians).collect();
        let listed: Vec<String> = points
            .iter()
            .map(|(value, seconds)| format!("{value}: {:.0}", seconds * 1e6))
            .collect();
        println!(
            "{:<26} {:<4} {:>8.2}   {:<8}   {}",
            format!("{}/{group}", layer.name()),
            axis.name,
            exponent(&points),
            expected(&group, axis.name),
            listed.join("  ")
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let test = std::env::args().any(|argument| argument == "--test");
    let device = Device::open()?;
    println!(
        "{}: width {WIDTH}, rank {RANK}; T = {}, E = {}, k = {} where they do not vary",
        device.name(),
        BASE.tokens,
        BASE.experts,
        BASE.top_k
    );
    println!(
        "{:<26} {:<4} {:>8}   {:<8}   points (median microseconds)",
        "what", "axis", "exponent", "expected"
    );
    for layer in [Layer::MoeLora, Layer::RotMole, Layer::Moe] {
        for axis in &AXES {
            run(&device, layer, axis, if test { 1 } else { SAMPLES })?;
        }
    }
    Ok(())
}
