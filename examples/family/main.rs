//! Every layer of the family on one small task, with every training option: which layers there are, what they cost, what their routers do.
//!
//!     cargo run --release --example family
//!     cargo run --release --example family -- --layer latent_moe --storage f16 --recompute --micro-batches 4
//!     cargo run --release --example family -- --layer moe --score sigmoid --selection-bias --capacity 1.25
//!
//! The task: points around a few centres, each with a rule of its own for which class a point is of. Two layers of the kind chosen, each
//! with a residual and an RMS norm, and a linear head; what stands under an adapter is frozen.

mod model;
mod task;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use model::{Kind, Model};
use rankmix::layers::{Capacity, Routing};
use rankmix::ops::{DropPolicy, Rotation, Score};
use rankmix::train::{AdamW, GradientAccumulation, LossScaling, Schedule};
use rankmix::{Device, DeviceOptions, Graph, ParameterStore, Precision, Tensor, TensorType};
use task::Task;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StorageChoice {
    F32,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScoreChoice {
    Softmax,
    Sigmoid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DropChoice {
    /// Later tokens first.
    Position,
    /// Smaller gates first.
    Gate,
}

/// Trains every layer of the family on a small task.
#[derive(Debug, Parser)]
struct Options {
    /// `cpu`, `vulkan`, `metal`, `dx12`, `gl`, or part of an adapter's name [default: RANKMIX_DEVICE, or the best there is]
    #[arg(long)]
    device: Option<String>,
    /// One layer instead of all.
    #[arg(long, value_enum)]
    layer: Option<Kind>,
    /// Steps of the optimiser.
    #[arg(long, default_value_t = 300)]
    steps: u64,
    /// Tokens a step.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-2)]
    learning_rate: f64,
    /// Experts of a mixture.
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts a token takes.
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// The rotation of RotMoLE.
    #[arg(long, default_value = "planes")]
    rotation: Rotation,
    /// What parameters and activations are stored in; f16 trains with a scaled loss.
    #[arg(long, value_enum, default_value = "f32")]
    storage: StorageChoice,
    /// Dropout on the adapters' input.
    #[arg(long, default_value_t = 0.0)]
    dropout: f32,
    /// Jitter on the routers' input.
    #[arg(long, default_value_t = 0.0)]
    jitter: f32,
    /// Scores of the experts.
    #[arg(long, value_enum, default_value = "softmax")]
    score: ScoreChoice,
    /// Balance experts by a bias on what they are chosen by, without an auxiliary loss.
    #[arg(long)]
    selection_bias: bool,
    /// An expert takes at most so many times its fair share of the tokens; the rest is dropped.
    #[arg(long)]
    capacity: Option<f64>,
    /// Which tokens are dropped.
    #[arg(long, value_enum, default_value = "position")]
    drop: DropChoice,
    /// Split each step's tokens into so many micro-batches.
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Compute the activations of each layer again in the backward pass.
    #[arg(long)]
    recompute: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Options {
    fn routing(&self) -> Routing {
        Routing {
            score: match self.score {
                ScoreChoice::Softmax => Score::Softmax,
                ScoreChoice::Sigmoid => Score::Sigmoid,
            },
            selection_bias: self.selection_bias,
            jitter: self.jitter,
            capacity: self.capacity.map(|factor| Capacity {
                factor,
                drop: match self.drop {
                    DropChoice::Position => DropPolicy::Position,
                    DropChoice::Gate => DropPolicy::Gate,
                },
            }),
            ..Routing::new(self.experts, self.top_k)
        }
    }

    fn precision(&self) -> Precision {
        match self.storage {
            StorageChoice::F32 => Precision::F32,
            StorageChoice::F16 => Precision::F16,
        }
    }
}

/// What a training came to.
struct Outcome {
    kind: Kind,
    trained: usize,
    first_loss: f64,
    last_loss: f64,
    accuracy: f64,
    pool_bytes: u64,
    pool_bytes_kept: u64,
    seconds: f64,
    router: String,
}

fn train(options: &Options, device: &Device, kind: Kind) -> Result<Outcome, Box<dyn Error>> {
    let model = Model {
        kind,
        routing: options.routing(),
        rotation: options.rotation,
        dropout: options.dropout,
        recompute: options.recompute,
    };
    let task = Task::new(options.seed);
    let tokens = options.tokens / options.micro_batches;
    let mut graph = Graph::new();
    graph.set_training(true);
    graph.set_precision(options.precision());
    let x = graph.input("x", TensorType::f32([tokens, task::WIDTH]))?;
    let labels = graph.input("labels", TensorType::i32([tokens]))?;
    let built = model.build(&mut graph, x)?;
    let task_loss = graph.cross_entropy(built.logits, labels)?;
    let loss = graph.add(task_loss, built.auxiliary_loss)?;
    graph.output(task_loss)?;
    let gradients = match options.storage {
        StorageChoice::F32 => graph.backward(loss)?,
        StorageChoice::F16 => graph.backward_scaled(loss, LossScaling::default())?,
    };
    model.update_routers(&mut graph, &built.routers)?;
    let trained = graph.trainable_elements();
    let accumulated =
        GradientAccumulation::new(options.micro_batches)?.add_to(&mut graph, &gradients)?;

    let store = ParameterStore::new(device);
    store.initialize(&graph, options.seed)?;
    let mut session = graph.compile(&store)?;
    session.set_random(options.seed as u32, 0)?;
    let adamw = AdamW {
        max_norm: Some(1.0),
        ..AdamW::default()
    };
    let mut update = accumulated.compile(&adamw, &store)?;
    let schedule = Schedule::Cosine {
        warmup: options.steps / 10,
        steps: options.steps,
    };
    let bar = ProgressBar::new(options.steps).with_style(ProgressStyle::with_template(
        "{msg:12} {bar:40} {pos}/{len} steps",
    )?);
    bar.set_message(kind.name());
    let begun = Instant::now();
    let mut losses = Vec::new();
    for step in 0..options.steps {
        let mut sum = 0.0;
        for micro_batch in 0..options.micro_batches {
            let batch = step * options.micro_batches as u64 + micro_batch as u64;
            let (points, classes) = task.batch(tokens, batch)?;
            session.set("x", &points)?;
            session.set("labels", &classes)?;
            sum += session.run_reading(&[task_loss])?[0]
                .item()
                .unwrap_or(f64::NAN);
            update.micro_batch_done(options.learning_rate * schedule.factor(step))?;
        }
        losses.push(sum / options.micro_batches as f64);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = begun.elapsed().as_secs_f64();
    let router = match built.metrics {
        Some(metrics) => {
            let values = [metrics.counts, metrics.dropped, metrics.entropy];
            let read = values.map(|value| session.read(value));
            let [counts, dropped, entropy] = read;
            describe(&counts?, &dropped?, &entropy?)
        }
        None => String::new(),
    };
    let memory = session.memory();
    Ok(Outcome {
        kind,
        trained,
        first_loss: losses[0],
        last_loss: losses[losses.len().saturating_sub(10)..]
            .iter()
            .sum::<f64>()
            / losses.len().min(10) as f64,
        accuracy: accuracy(&model, &task, &store, options)?,
        pool_bytes: memory.pool,
        pool_bytes_kept: memory.pool_without_recomputation,
        seconds,
        router,
    })
}

/// Loads, drops and entropy of the second layer's router in the last run.
fn describe(counts: &Tensor, dropped: &Tensor, entropy: &Tensor) -> String {
    let numbers = |tensor: &Tensor| tensor.to_f64();
    let (counts, dropped) = (numbers(counts), numbers(dropped));
    let total: f64 = counts.iter().sum();
    let share = |count: f64| format!("{:.0}", 100.0 * count / total);
    let loads: Vec<String> = counts.iter().map(|&count| share(count)).collect();
    format!(
        "load {} %, dropped {} %, entropy {:.2}",
        loads.join(" "),
        share(dropped.iter().sum()),
        entropy.item().unwrap_or(f64::NAN)
    )
}

/// The part of unseen points whose class an evaluation graph gets right: no dropout, no jitter, parameters from the same store.
fn accuracy(
    model: &Model,
    task: &Task,
    store: &ParameterStore,
    options: &Options,
) -> Result<f64, Box<dyn Error>> {
    const POINTS: usize = 1024;
    let mut graph = Graph::new();
    graph.set_precision(options.precision());
    let x = graph.input("x", TensorType::f32([POINTS, task::WIDTH]))?;
    let logits = model.build(&mut graph, x)?.logits;
    graph.output(logits)?;
    let mut session = graph.compile(store)?;
    let (points, classes) = task.batch(POINTS, u64::MAX - 1)?;
    session.set("x", &points)?;
    let logits = session.run_reading(&[logits])?[0].to_f32();
    let right = logits
        .chunks(task::CLASSES)
        .zip(classes.as_i32().unwrap_or_default())
        .filter(|(row, class)| {
            let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            best.is_some_and(|(at, _)| at as i32 == **class)
        })
        .count();
    Ok(right as f64 / POINTS as f64)
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.micro_batches == 0 || options.tokens < options.micro_batches || options.steps == 0 {
        return Err("there must be at least one step, one micro-batch, and a token in each".into());
    }
    let device = Device::open_with(&DeviceOptions {
        request: options.device.clone(),
        ..DeviceOptions::default()
    })?;
    println!("device: {}\n", device.name());
    println!("layer         trained      loss               held-out  pool       seconds");
    for &kind in Kind::value_variants() {
        if options.layer.is_some_and(|layer| layer != kind) {
            continue;
        }
        let outcome = train(options, &device, kind)?;
        println!(
            "{:12} {:>8}      {:.3} to {:.3}     {:>5.1} %   {:>6.1} KiB {:>7.1}",
            outcome.kind.name(),
            outcome.trained,
            outcome.first_loss,
            outcome.last_loss,
            100.0 * outcome.accuracy,
            outcome.pool_bytes as f64 / 1024.0,
            outcome.seconds,
        );
        if options.recompute {
            println!(
                "             recomputed: the pool would be {:.1} KiB",
                outcome.pool_bytes_kept as f64 / 1024.0
            );
        }
        if !outcome.router.is_empty() {
            println!("             {}", outcome.router);
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("family: {error}");
            ExitCode::FAILURE
        }
    }
}
