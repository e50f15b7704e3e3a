//! `rankmix time`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use rankmix::layers::{
    AdapterOptions, CoMol, CoreRouting, FeedForward, GateInput, LatentMoe, Linear, Lora, Moe,
    MoeLora, RotMole, Routing,
};
use rankmix::ops::Rotation;
use rankmix::{
    Device, Error, Graph, ParameterStore, Result, Session, Shape, Tensor, TensorType, Value,
};
use serde::Serialize;

use crate::{DeviceArguments, StorageArguments};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Layer {
    Lora,
    #[value(name = "moe_lora")]
    MoeLora,
    Rotmole,
    Comol,
    Moe,
    #[value(name = "latent_moe")]
    LatentMoe,
}

impl Layer {
    /// A feed-forward layer, of which `hidden` and `intermediate` are the widths; else an adapted linear layer.
    fn is_feed_forward(self) -> bool {
        matches!(self, Self::Moe | Self::LatentMoe)
    }

    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// The layer's sizes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    storage: StorageArguments,
    /// The layer.
    #[arg(long, value_enum, default_value = "rotmole")]
    pub(crate) layer: Layer,
    /// Tokens (rows of the input) [default: 512, or 256 for moe and latent_moe]
    #[arg(long)]
    tokens: Option<usize>,
    /// Width of an adapted layer's input.
    #[arg(long, default_value_t = 1024)]
    d_in: usize,
    /// Width of an adapted layer's output.
    #[arg(long, default_value_t = 1024)]
    d_out: usize,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Experts.
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts a token takes.
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// `planes`, `givens`, `cayley`, `butterfly`, `brick_wall:N` (N layers) or `householder`.
    #[arg(long, default_value = "planes")]
    rotation: Rotation,
    /// What the rotation gate looks at: `input`, `latent`, or `static` for nothing.
    #[arg(long, default_value = "input")]
    gate_input: GateInput,
    /// Keep every number of the rotation within ±π.
    #[arg(long)]
    bounded: bool,
    /// CoMoL: let the router look at the layer's input instead of the latent.
    #[arg(long)]
    raw_routing: bool,
    /// CoMoL: gates over the `top_k` chosen experts instead of all.
    #[arg(long)]
    sparse: bool,
    /// Width of a feed-forward layer's input and output.
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// Width inside a feed-forward expert.
    #[arg(long, default_value_t = 256)]
    intermediate: usize,
    /// Latent MoE: width of the latents.
    #[arg(long, default_value_t = 256)]
    latent: usize,
    /// Latent MoE: groups of experts that share latents.
    #[arg(long, default_value_t = 2)]
    groups: usize,
    /// Latent MoE: factor the down projections too.
    #[arg(long)]
    factored_down: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Serialize)]
struct Timing {
    layer: String,
    device: String,
    forward_compile_seconds: f64,
    forward_first_seconds: f64,
    step_compile_seconds: f64,
    step_first_seconds: f64,
    forward_seconds: f64,
    step_seconds: f64,
    /// Time that the host takes to submit a step, not to see it done, for each launch.
    host_seconds_per_launch: Option<f64>,
    peak_bytes: u64,
    /// Of them the buffers that computed values share; the rest are parameters and inputs.
    pool_bytes: u64,
    /// The buffers that computed values share, over the least they could do with.
    pool_over_lower_bound: f64,
    launches: u64,
    submits: u64,
}

/// At least this many runs are timed, and for at least this long.
const RUNS: usize = 11;
const SPAN: Duration = Duration::from_secs(2);

/// Command lines that say nothing.
#[derive(Debug, Parser)]
struct Silent {
    #[command(flatten)]
    options: Options,
}

impl Options {
    /// The sizes of a layer where nothing else is said.
    pub(crate) fn defaults(layer: Layer) -> Self {
        Self {
            layer,
            ..Silent::parse_from(["rankmix"]).options
        }
    }

    fn tokens(&self) -> usize {
        let default = if self.layer.is_feed_forward() {
            256
        } else {
            512
        };
        self.tokens.unwrap_or(default)
    }

    /// Shapes of the input and of the output.
    pub(crate) fn shapes(&self) -> [[usize; 2]; 2] {
        let (d_in, d_out) = if self.layer.is_feed_forward() {
            (self.hidden, self.hidden)
        } else {
            (self.d_in, self.d_out)
        };
        [[self.tokens(), d_in], [self.tokens(), d_out]]
    }
}

pub(crate) fn layer_output(options: &Options, graph: &mut Graph, x: Value) -> Result<Value> {
    let base = Linear::new("layer", options.d_in, options.d_out);
    let adapter = AdapterOptions::new(options.rank, 2.0 * options.rank as f32);
    let router = Routing::new(options.experts, options.top_k);
    let expert = FeedForward::new(options.hidden, options.intermediate);
    match options.layer {
        Layer::Lora => Lora::new(base, adapter)?.forward(graph, x),
        Layer::MoeLora => Ok(MoeLora::new(base, adapter, router)?
            .forward(graph, x)?
            .output),
        Layer::Rotmole => {
            let mut layer = RotMole::with_rotation(
                base,
                adapter,
                router,
                options.rotation,
                options.gate_input,
            )?;
            layer.bounded = options.bounded;
            Ok(layer.forward(graph, x)?.output)
        }
        Layer::Comol => {
            let mut layer = CoMol::new(base, adapter, options.experts)?;
            if options.raw_routing {
                layer.routing = CoreRouting::Raw;
            }
            if options.sparse {
                layer = layer.with_sparse_gate(router)?;
            }
            Ok(layer.forward(graph, x)?.output)
        }
        Layer::Moe => Ok(Moe::new("layer", expert, router)?.forward(graph, x)?.output),
        Layer::LatentMoe => {
            let (latent, groups) = (options.latent, options.groups);
            let mut layer = LatentMoe::new("layer", expert, latent, groups, router)?;
            layer.factored_down = options.factored_down;
            Ok(layer.forward(graph, x)?.output)
        }
    }
}

/// Numbers in -1..1 that are all different: timing zeros would flatter some hardware. A graph should have accepted the shape.
pub(crate) fn ramp(shape: impl Into<Shape>) -> Result<Tensor> {
    ramp_within(1.0, shape.into())
}

fn ramp_within(bound: f32, shape: Shape) -> Result<Tensor> {
    let bytes = shape
        .dims()
        .iter()
        .try_fold(size_of::<f32>(), |bytes, &extent| bytes.checked_mul(extent))
        .unwrap_or(usize::MAX);
    let count = bytes / size_of::<f32>();
    let mut data = Vec::new();
    data.try_reserve_exact(count)
        .map_err(|_| Error::OutOfMemory {
            thing: "an operand on the host".to_owned(),
            bytes: bytes as u64,
        })?;
    data.extend((0..count).map(|i| ((i as f32 * 0.618_034).fract() * 2.0 - 1.0) * bound));
    Tensor::f32(shape, data)
}

/// Seconds of a session's runs.
struct Runs {
    /// Of the first run, synchronised: drivers compile much of a kernel when it is first used.
    first: f64,
    /// The median of the later runs, synchronised.
    synchronised: f64,
    /// The median until a run is submitted.
    host: f64,
}

pub(crate) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn time_runs(session: &mut Session) -> Result<Runs> {
    let device = session.device().clone();
    let mut run = || -> Result<[f64; 2]> {
        let start = Instant::now();
        session.run()?;
        let host = start.elapsed();
        device.wait()?;
        Ok([start.elapsed(), host].map(|span| span.as_secs_f64()))
    };
    let [first, _] = run()?;
    run()?;
    let begun = Instant::now();
    let (mut synchronised, mut host) = (Vec::new(), Vec::new());
    while host.len() < RUNS || begun.elapsed() < SPAN {
        let [whole, submitted] = run()?;
        synchronised.push(whole);
        host.push(submitted);
    }
    Ok(Runs {
        first,
        synchronised: median(synchronised),
        host: median(host),
    })
}

/// Compiles a graph and says how many seconds it took.
fn timed_compile(graph: &Graph, store: &ParameterStore) -> Result<(Session, f64)> {
    let start = Instant::now();
    let session = graph.compile(store)?;
    Ok((session, start.elapsed().as_secs_f64()))
}

/// A layer forward and backward, the gradients of its input and of all it trains among the outputs; reads `x` and `upstream`.
pub(crate) fn step_graph(options: &Options) -> Result<Graph> {
    let [x_shape, y_shape] = options.shapes();
    let mut graph = Graph::new();
    graph.set_precision(options.storage.precision());
    let x = graph.input("x", TensorType::f32(x_shape))?;
    let output = layer_output(options, &mut graph, x)?;
    let upstream = graph.input("upstream", TensorType::f32(y_shape))?;
    let wanted: Vec<Value> = std::iter::once(x).chain(graph.trainable()).collect();
    for gradient in graph.gradients_from(&[(output, upstream)], &wanted)? {
        graph.output(gradient)?;
    }
    graph.output(output)?;
    Ok(graph)
}

fn measure(options: &Options, device: &Device) -> Result<Timing> {
    let [x_shape, y_shape] = options.shapes();
    let store = ParameterStore::new(device);
    let mut graph = Graph::new();
    graph.set_precision(options.storage.precision());
    let x = graph.input("x", TensorType::f32(x_shape))?;
    let output = layer_output(options, &mut graph, x)?;
    graph.output(output)?;
    // Both graphs before any memory is taken: building them is what checks the sizes.
    let step_graph = step_graph(options)?;
    store.initialize(&graph, 1)?;
    // B and the rotation gate start at zero; numbers that are not keep every kernel honest.
    for spec in graph.parameters().iter().filter(|spec| spec.trainable) {
        store.insert(&spec.name, &ramp_within(0.05, spec.ty.shape.clone())?)?;
    }
    let (mut forward, forward_compile_seconds) = timed_compile(&graph, &store)?;
    let x_data = ramp(x_shape)?;
    forward.set("x", &x_data)?;
    let forward_runs = time_runs(&mut forward)?;
    drop(forward);

    let (mut step, step_compile_seconds) = timed_compile(&step_graph, &store)?;
    step.set("x", &x_data)?;
    step.set("upstream", &ramp(y_shape)?)?;
    let step_runs = time_runs(&mut step)?;
    let before = device.counters();
    step.run()?;
    device.wait()?;
    let after = device.counters();
    let memory = step.memory();
    let planned = memory.parameters + memory.inputs + memory.pool;
    let launches = after.launches - before.launches;
    Ok(Timing {
        layer: options.layer.name(),
        device: device.name(),
        forward_compile_seconds,
        forward_first_seconds: forward_runs.first,
        step_compile_seconds,
        step_first_seconds: step_runs.first,
        forward_seconds: forward_runs.synchronised,
        step_seconds: step_runs.synchronised,
        host_seconds_per_launch: (launches > 0).then(|| step_runs.host / launches as f64),
        peak_bytes: if after.peak_bytes > 0 {
            after.peak_bytes
        } else {
            planned
        },
        pool_bytes: memory.pool,
        pool_over_lower_bound: memory.pool as f64 / memory.pool_lower_bound as f64,
        launches,
        submits: after.submits - before.submits,
    })
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let device = options.device.open()?;
    let timing = measure(options, &device)?;
    if options.json {
        let text = serde_json::to_string(&timing).map_err(|error| Error::Gpu {
            thing: "writing JSON".to_owned(),
            reason: error.to_string(),
        })?;
        println!("{text}");
    } else {
        println!("{} on {}", timing.layer, timing.device);
        let seconds = |what: &str, seconds: f64| println!("  {what:<27}{seconds:.6} s");
        seconds("compile forward", timing.forward_compile_seconds);
        seconds("first forward", timing.forward_first_seconds);
        seconds("compile forward + backward", timing.step_compile_seconds);
        seconds("first forward + backward", timing.step_first_seconds);
        seconds("forward", timing.forward_seconds);
        seconds("forward + backward", timing.step_seconds);
        if let Some(host) = timing.host_seconds_per_launch {
            println!("  host time a launch         {:.3} us", host * 1e6);
        }
        println!(
            "  peak device memory         {:.2} MiB",
            timing.peak_bytes as f64 / f64::from(1 << 20)
        );
        println!(
            "  of it computed values      {:.2} MiB",
            timing.pool_bytes as f64 / f64::from(1 << 20)
        );
        println!(
            "  pool over lower bound      {:.3}",
            timing.pool_over_lower_bound
        );
        println!("  launches a step            {}", timing.launches);
        println!("  submits a step             {}", timing.submits);
    }
    Ok(ExitCode::SUCCESS)
}
