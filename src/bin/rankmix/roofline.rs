//! `rankmix roofline`: how far operations and layers are from what the device can do at best.

mod cases;
mod measure;

use std::process::ExitCode;

use clap::ValueEnum;
use rankmix::graph::Cost;
use rankmix::{
    DType, Device, Error, Graph, Init, ParameterStore, Precision, Result, Tensor, TensorType, Value,
};
use serde::Serialize;

use crate::roofline::cases::{Before, Case};
use crate::roofline::measure::{Clock, Limits, Timed, limits, seconds};
use crate::time::{self, Layer, layer_output, ramp};
use crate::{DeviceArguments, StorageArguments};

/// The input that an optimiser adds.
const SCHEDULE: &str = "adamw.schedule";

/// What to measure on.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    device: DeviceArguments,
    #[command(flatten)]
    storage: StorageArguments,
    /// Only operations and layers whose names contain this.
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    limits: Limits,
    rows: Vec<Row>,
}

/// An operation or a layer against the limits.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    size: String,
    launches: usize,
    flops: u64,
    bytes: u64,
    seconds: f64,
    /// Whether memory binds it, or arithmetic.
    memory_bound: bool,
    /// The least seconds by that limit, divided by those it took; null for what is too short to be timed.
    share: Option<f64>,
}

impl Row {
    fn new(
        (name, size): (String, String),
        launches: usize,
        cost: Cost,
        seconds: f64,
        limits: &Limits,
    ) -> Self {
        let (least, memory_bound) = limits.least_seconds(cost);
        Self {
            name,
            size,
            launches,
            flops: cost.flops,
            bytes: cost.bytes,
            seconds,
            memory_bound,
            share: (seconds > 0.0).then(|| least / seconds),
        }
    }
}

/// Operands as the case wants them: floats as parameters, so that they are stored as the precision says, integers as inputs.
fn operands(graph: &mut Graph, case: &Case) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    for (number, (ty, _)) in case.operands.iter().enumerate() {
        let name = format!("operand {number}");
        values.push(match ty.dtype {
            DType::I32 => graph.input(&name, ty.clone())?,
            _ => {
                let data = ramp(ty.dims())?;
                graph.parameter(&name, ty.dims(), Init::Given(data), false)?
            }
        });
    }
    Ok(values)
}

/// A case's graph with what comes before the operation, and with the operation too if `whole`.
fn graph_of(case: &Case, precision: Precision, whole: bool) -> Result<Graph> {
    let mut graph = Graph::new();
    graph.set_precision(precision);
    let values = operands(&mut graph, case)?;
    let before: Before = (case.prepare)(&mut graph, &values)?;
    for &value in &before.values {
        graph.output(value)?;
    }
    if whole {
        for value in (case.build)(&mut graph, &values, &before)? {
            graph.output(value)?;
        }
    }
    Ok(graph)
}

fn compiled(case: &Case, graph: &Graph, store: &ParameterStore) -> Result<Timed> {
    let mut timed = Timed::new(graph, store)?;
    for (number, (ty, limit)) in case.operands.iter().enumerate() {
        if ty.dtype == DType::I32 {
            let indices = (0..ty.elements()).map(|i| (i * 7919 % limit) as i32);
            let indices = Tensor::i32(ty.dims(), indices.collect())?;
            timed
                .session()
                .set(&format!("operand {number}"), &indices)?;
        }
    }
    // What an optimiser reads, where there is one: the rate and the corrections.
    let schedule = Tensor::f32([3], vec![1e-3, 1.0, 1.0])?;
    match timed.session().set(SCHEDULE, &schedule) {
        Ok(()) | Err(Error::UnknownName { .. }) => Ok(timed),
        Err(error) => Err(error),
    }
}

fn operation(case: &Case, device: &Device, precision: Precision, limits: &Limits) -> Result<Row> {
    let graph = graph_of(case, precision, true)?;
    let front = graph_of(case, precision, false)?;
    let skipped = front.operation_costs()?.len();
    let costs = graph.operation_costs()?;
    let cost = costs.iter().skip(skipped).map(|one| one.cost).sum();
    let store = ParameterStore::new(device);
    store.initialize(&graph, 1)?;
    let mut work = compiled(case, &graph, &store)?;
    let mut before = match skipped {
        0 => None,
        _ => Some(compiled(case, &front, &store)?),
    };
    let in_front = before.as_ref().map_or(0, Timed::launches);
    let launches = work.launches() - in_front;
    let seconds = seconds(limits, &mut work, before.as_mut())?;
    let labels = (case.name.clone(), case.size.clone());
    Ok(Row::new(labels, launches, cost, seconds, limits))
}

/// A layer at the sizes of `rankmix time`, forward, and forward and backward.
fn layer(layer: Layer, device: &Device, precision: Precision, limits: &Limits) -> Result<[Row; 2]> {
    let options = time::Options::defaults(layer);
    let [x_shape, y_shape] = options.shapes();
    let store = ParameterStore::new(device);
    let row = |with_gradients: bool| {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let x = graph.input("x", TensorType::f32(x_shape))?;
        let output = layer_output(&options, &mut graph, x)?;
        graph.output(output)?;
        if with_gradients {
            let upstream = graph.input("upstream", TensorType::f32(y_shape))?;
            let wanted: Vec<Value> = std::iter::once(x).chain(graph.trainable()).collect();
            for gradient in graph.gradients_from(&[(output, upstream)], &wanted)? {
                graph.output(gradient)?;
            }
        }
        store.initialize(&graph, 1)?;
        let mut work = Timed::new(&graph, &store)?;
        work.session().set("x", &ramp(x_shape)?)?;
        if with_gradients {
            work.session().set("upstream", &ramp(y_shape)?)?;
        }
        let seconds = seconds(limits, &mut work, None)?;
        let pass = if with_gradients {
            "forward + backward"
        } else {
            "forward"
        };
        let labels = (layer.name(), pass.to_owned());
        let (launches, cost) = (work.launches(), graph.cost()?);
        Ok(Row::new(labels, launches, cost, seconds, limits))
    };
    Ok([row(false)?, row(true)?])
}

fn measure(options: &Options, device: &Device) -> Result<Report> {
    let precision = options.storage.precision();
    let wanted = |name: &str| {
        let part = options.only.as_deref();
        part.is_none_or(|part| name.contains(part))
    };
    let limits = limits(device)?;
    let mut rows = Vec::new();
    for case in cases::cases()?.iter().filter(|case| wanted(&case.name)) {
        rows.push(operation(case, device, precision, &limits)?);
    }
    for &kind in Layer::value_variants() {
        if wanted(&kind.name()) {
            rows.extend(layer(kind, device, precision, &limits)?);
        }
    }
    Ok(Report {
        device: device.name(),
        limits,
        rows,
    })
}

fn print(report: &Report) {
    let limits = &report.limits;
    println!("{}", report.device);
    println!(
        "  arithmetic  {:.1} GFLOP/s, reached by {}",
        limits.flops_per_second * 1e-9,
        limits.fastest
    );
    println!(
        "  memory      {:.1} GB/s, reading and writing of a copy by {}",
        limits.bytes_per_second * 1e-9,
        limits.fastest_copy
    );
    println!("  a launch    {:.2} us", limits.launch_seconds * 1e6);
    println!(
        "  a submission of one launch, waited for  {:.1} us",
        limits.submission_seconds * 1e6
    );
    println!(
        "  times are {}",
        match limits.clock {
            Clock::Timestamps => "the device's timestamps",
            Clock::Wall =>
                "by the wall clock, many runs in a submission, less launches and submission",
        }
    );
    println!("  more than 100 %: operands that stay in caches, which the copy is too large for");
    println!();
    println!(
        "{:28} {:34} {:>8} {:>9} {:>9} {:>10} {:>9} {:>8} {:>6}  bound by",
        "", "size", "launches", "MFLOP", "MB", "us", "GFLOP/s", "GB/s", "share"
    );
    for row in &report.rows {
        let per_second = |amount: u64| match row.share {
            Some(_) => format!("{:.1}", amount as f64 / row.seconds * 1e-9),
            None => "-".to_owned(),
        };
        println!(
            "{:28} {:34} {:>8} {:>9.3} {:>9.3} {:>10.1} {:>9} {:>8} {:>6}  {}",
            row.name,
            row.size,
            row.launches,
            row.flops as f64 * 1e-6,
            row.bytes as f64 * 1e-6,
            row.seconds * 1e6,
            per_second(row.flops),
            per_second(row.bytes),
            row.share
                .map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0)),
            if row.memory_bound {
                "memory"
            } else {
                "arithmetic"
            }
        );
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let report = measure(options, &options.device.open()?)?;
    if options.json {
        let text = serde_json::to_string(&report).map_err(|error| Error::Gpu {
            thing: "writing JSON".to_owned(),
            reason: error.to_string(),
        })?;
        println!("{text}");
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}
