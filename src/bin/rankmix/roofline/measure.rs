//! How long work takes, and the device's own limits, by the same clock.

use std::time::{Duration, Instant};

use rankmix::device::AdapterClass;
use rankmix::graph::Cost;
use rankmix::ops::{CopyForm, MultiplyAdds};
use rankmix::{Device, Graph, Init, ParameterStore, Result, Session, TensorType, Value};
use serde::Serialize;

use crate::time::{median, ramp};

/// At least this many samples of everything, and for at least this long.
const SAMPLES: usize = 7;
const SPAN: Duration = Duration::from_millis(250);
/// What one sample by the wall clock should take: far more than a submission.
const SAMPLE_SECONDS: f64 = 0.02;
/// Launches in a row whose cost is measured.
const ROW: usize = 256;
/// Elements of a copy, 128 MiB: beyond the caches, within every adapter's largest binding.
const COPIED: usize = 1 << 25;

/// What times are taken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Clock {
    /// The device's timestamps around every launch.
    Timestamps,
    /// The host's clock around many runs in one submission, less the cost of the submission and of the launches.
    Wall,
}

/// A device's own limits.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Limits {
    pub(crate) clock: Clock,
    /// A submission of one small launch, waited for.
    pub(crate) submission_seconds: f64,
    /// One more small launch in a submission.
    pub(crate) launch_seconds: f64,
    pub(crate) flops_per_second: f64,
    /// What reached that rate.
    pub(crate) fastest: String,
    pub(crate) bytes_per_second: f64,
    /// What copied at that rate.
    pub(crate) fastest_copy: String,
}

impl Limits {
    /// The least seconds that the work can take, and whether memory is what binds it.
    pub(crate) fn least_seconds(&self, cost: Cost) -> (f64, bool) {
        let arithmetic = cost.flops as f64 / self.flops_per_second;
        let memory = cost.bytes as f64 / self.bytes_per_second;
        (arithmetic.max(memory), memory >= arithmetic)
    }
}

/// Samples every function in turn until there are enough, and returns their medians.
fn medians(sample: &mut dyn FnMut(usize) -> Result<f64>, count: usize) -> Result<Vec<f64>> {
    let mut samples = vec![Vec::new(); count];
    let begun = Instant::now();
    while samples[0].len() < SAMPLES || begun.elapsed() < SPAN {
        for (which, samples) in samples.iter_mut().enumerate() {
            samples.push(sample(which)?);
        }
    }
    Ok(samples.into_iter().map(median).collect())
}

fn timed(session: &mut Session, times: usize) -> Result<f64> {
    let device = session.device().clone();
    let start = Instant::now();
    session.run_repeatedly(times)?;
    device.wait()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Something to time: a session, and how many of its launches.
pub(crate) struct Timed {
    session: Session,
    launches: usize,
}

impl Timed {
    pub(crate) fn new(graph: &Graph, store: &ParameterStore) -> Result<Self> {
        let session = graph.compile(store)?;
        let launches = if session.device().adapter().is_some() {
            session.launches().len()
        } else {
            // On the CPU every operation that does something is a launch.
            let costs = graph.operation_costs()?.into_iter();
            costs.filter(|one| one.cost != Cost::default()).count()
        };
        Ok(Self { session, launches })
    }

    pub(crate) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    pub(crate) fn launches(&self) -> usize {
        self.launches
    }
}

/// The seconds of the work by the clock, less those of `before`, the operations in front that are not meant. Not below 0: what is shorter than
/// the clock can tell takes no time.
pub(crate) fn seconds(
    limits: &Limits,
    work: &mut Timed,
    before: Option<&mut Timed>,
) -> Result<f64> {
    if limits.clock == Clock::Timestamps {
        let skipped = before.map_or(0, |before| before.launches);
        return device_seconds(&mut work.session, skipped);
    }
    let mut parts = vec![work];
    parts.extend(before);
    let mut times = Vec::new();
    for part in &mut parts {
        timed(&mut part.session, 1)?;
        let once = timed(&mut part.session, 1)?.max(1e-7);
        times.push(((SAMPLE_SECONDS / once) as usize).clamp(1, 512));
    }
    let count = parts.len();
    let runs = medians(
        &mut |which| {
            let seconds = timed(&mut parts[which].session, times[which])?;
            Ok((seconds - limits.submission_seconds) / times[which] as f64)
        },
        count,
    )?;
    let net = |which: usize| runs[which] - parts[which].launches as f64 * limits.launch_seconds;
    let in_front = if count == 2 { net(1).max(0.0) } else { 0.0 };
    Ok((net(0) - in_front).max(0.0))
}

/// The median of what the device says that the launches of a run take, the first `skipped` left out.
fn device_seconds(session: &mut Session, skipped: usize) -> Result<f64> {
    session.profile()?;
    let mut sample = |_: usize| -> Result<f64> {
        let launches = session.profile()?;
        Ok(launches.iter().skip(skipped).map(|one| one.seconds).sum())
    };
    Ok(medians(&mut sample, 1)?[0])
}

/// A graph on one operand, compiled with the operand in place.
fn on_one_operand(
    device: &Device,
    elements: usize,
    build: impl FnOnce(&mut Graph, Value) -> Result<Value>,
) -> Result<(Timed, Cost)> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([elements]))?;
    let y = build(&mut graph, x)?;
    graph.output(y)?;
    let mut timed = Timed::new(&graph, &ParameterStore::new(device))?;
    timed.session.set("x", &ramp([elements])?)?;
    Ok((timed, graph.cost()?))
}

/// Measures what the device can do at best.
pub(crate) fn limits(device: &Device) -> Result<Limits> {
    let row = |count: usize| {
        let build = |graph: &mut Graph, x: Value| {
            (0..count).try_fold(x, |value, _| graph.affine(value, 0.5, 0.25))
        };
        on_one_operand(device, 4, build)
    };
    let mut rows = [row(1)?.0, row(1 + ROW)?.0];
    for row in &mut rows {
        timed(&mut row.session, 1)?;
    }
    let both = medians(&mut |which| timed(&mut rows[which].session, 1), 2)?;
    let mut limits = Limits {
        clock: Clock::Wall,
        submission_seconds: if device.adapter().is_some() {
            both[0]
        } else {
            0.0
        },
        launch_seconds: ((both[1] - both[0]) / ROW as f64).max(0.0),
        flops_per_second: 0.0,
        fastest: String::new(),
        bytes_per_second: 0.0,
        fastest_copy: String::new(),
    };
    if device
        .adapter()
        .is_some_and(|adapter| adapter.capabilities.timestamps)
    {
        // Some drivers have timestamps that stand still.
        if device_seconds(&mut rows[1].session, 0)? > 0.0 {
            limits.clock = Clock::Timestamps;
        }
    }
    drop(rows);
    match device.adapter().map(|adapter| adapter.capabilities.class) {
        None => products(device, &mut limits)?,
        Some(class) => multiply_adds(device, class, &mut limits)?,
    }
    copies(device, &mut limits)?;
    Ok(limits)
}

/// So much a second; 0 of what took no longer than its submission, of which the clock says nothing.
fn rate(amount: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        amount as f64 / seconds
    } else {
        0.0
    }
}

/// The memory: a copy in every form that there is, as adapters differ in what is fastest.
fn copies(device: &Device, limits: &mut Limits) -> Result<()> {
    let forms: &[CopyForm] = match device.adapter() {
        Some(_) => &CopyForm::ALL,
        None => &CopyForm::ALL[..1],
    };
    for &form in forms {
        let (mut copy, cost) =
            on_one_operand(device, COPIED, |graph, x| graph.copy_in_form(x, form))?;
        let rate = rate(cost.bytes, seconds(limits, &mut copy, None)?);
        if rate > limits.bytes_per_second {
            limits.bytes_per_second = rate;
            limits.fastest_copy = match device.adapter() {
                Some(_) => format!(
                    "{} x {} pieces of 16 bytes a workgroup",
                    form.workgroup, form.quads
                ),
                None => "the host's".to_owned(),
            };
        }
    }
    Ok(())
}

/// The arithmetic of an adapter: chains of multiply-adds in registers.
fn multiply_adds(device: &Device, class: AdapterClass, limits: &mut Limits) -> Result<()> {
    let elements = if class == AdapterClass::Software {
        1 << 16
    } else {
        1 << 20
    };
    for fused in [false, true] {
        for chains in [1, 2, 3, 4, 6, 8] {
            let mut turns = 32;
            loop {
                let options = MultiplyAdds {
                    chains,
                    turns,
                    fused,
                };
                let (mut work, cost) =
                    on_one_operand(device, elements, |graph, x| graph.multiply_adds(x, options))?;
                // Long enough that starting and ending weigh nothing.
                timed(&mut work.session, 1)?;
                let once = timed(&mut work.session, 1)?;
                if once < 0.01 && turns < MultiplyAdds::MAX_TURNS {
                    turns = (turns * 4).min(MultiplyAdds::MAX_TURNS);
                    continue;
                }
                let rate = rate(cost.flops, seconds(limits, &mut work, None)?);
                if rate > limits.flops_per_second {
                    limits.flops_per_second = rate;
                    let step = if fused { "fma(a, b, c)" } else { "a * b + c" };
                    limits.fastest = format!("{chains} chains of {step}");
                }
                break;
            }
        }
    }
    Ok(())
}

/// The arithmetic of the CPU executor: matrix products.
fn products(device: &Device, limits: &mut Limits) -> Result<()> {
    for n in [512, 1024, 2048] {
        let mut graph = Graph::new();
        let [a, b] = ["a", "b"].map(|name| {
            let values = Init::Uniform { bound: 1.0 };
            graph.parameter(name, [n, n], values, false)
        });
        let product = graph.matmul(a?, b?)?;
        graph.output(product)?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 1)?;
        let mut work = Timed::new(&graph, &store)?;
        let rate = rate(graph.cost()?.flops, seconds(limits, &mut work, None)?);
        if rate > limits.flops_per_second {
            limits.flops_per_second = rate;
            limits.fastest = format!("a matrix product of {n} x {n} x {n}");
        }
    }
    Ok(())
}
