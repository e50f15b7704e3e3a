//! Routing and sorting in one launch gives bit for bit what the two operations give, which are made to run by one expert or one token
//! more than a workgroup takes, with logits so low that the rest is as it was.

use libtest_mimic::{Failed, Trial};
use rankmix::device::Capabilities;
use rankmix::ops::{Route, Score};
use rankmix::{Device, Graph, ParameterStore, Precision, Result, Tensor, TensorType, Value};

use crate::case::{floats, floats_in};
use crate::devices;
use crate::popularity::{Popularity, rows};

/// One more than one workgroup takes.
const EXPERTS: usize = 65;
const TOKENS: usize = 4097;
/// A finite half.
const MASKED: f64 = -60_000.0;

/// What is routed.
struct Routing {
    /// `[tokens, experts]`, row by row.
    logits: Vec<Vec<f64>>,
    /// `[experts]`.
    bias: Option<Vec<f64>>,
    /// Rows of `[tokens, top_k]`.
    upstream: Vec<Vec<f64>>,
    route: Route,
    precision: Precision,
}

/// Logits and upstream, and the bias if there is one.
type Inputs = ([Value; 2], Option<Value>);

/// Rows of results, as bits.
#[derive(Debug, PartialEq)]
struct Routed {
    experts: Vec<Vec<u64>>,
    gates: Vec<Vec<u64>>,
    gradient: Vec<Vec<u64>>,
}

fn tensor(rows: &[Vec<f64>]) -> Result<Tensor> {
    Tensor::f64([rows.len(), rows[0].len()], rows.concat())
}

/// The tensor's rows, cut to so many columns.
fn bits(tensor: &Tensor, columns: usize) -> Vec<Vec<u64>> {
    let numbers: Vec<u64> = match tensor.as_i32() {
        Some(integers) => integers.iter().map(|&i| i as u64).collect(),
        None => tensor.to_f64().iter().map(|x| x.to_bits()).collect(),
    };
    let width = tensor.shape().last();
    numbers
        .chunks(width)
        .map(|row| row[..columns].to_vec())
        .collect()
}

fn kernels(graph: &Graph, name: &str) -> Result<usize> {
    let launches = graph.launches(&Capabilities::webgpu_defaults(), false)?;
    let named = launches
        .iter()
        .filter(|launch| launch.shader.name.starts_with(name));
    Ok(named.count())
}

impl Routing {
    fn graph(&self) -> Result<(Graph, Inputs, Vec<Value>)> {
        let mut graph = Graph::new();
        graph.set_precision(self.precision);
        let sizes = [self.logits.len(), self.logits[0].len()];
        let logits = graph.input("logits", TensorType::f32(sizes))?;
        let upstream = graph.input("upstream", TensorType::f32([sizes[0], self.route.top_k]))?;
        let bias = match self.bias {
            Some(_) => Some(graph.input("bias", TensorType::f32([sizes[1]]))?),
            None => None,
        };
        // Computed, and so stored as the precision says.
        let stored = graph.scale(logits, 1.0)?;
        let routed = graph.route_with(stored, bias, self.route)?;
        let gradient = graph.gradients_from(&[(routed.gates, upstream)], &[stored])?[0];
        let segments = routed.segments;
        let results = vec![
            routed.experts(),
            routed.gates,
            gradient,
            segments.order(),
            segments.offsets(),
        ];
        for &value in &results {
            graph.output(value)?;
        }
        Ok((graph, ([logits, upstream], bias), results))
    }

    /// The results for the first `experts` experts, after a look at the sorted pairs.
    fn run(
        &self,
        device: &Device,
        experts: usize,
        together: bool,
    ) -> std::result::Result<Routed, Failed> {
        let (graph, ([logits, upstream], bias), results) = self.graph()?;
        let (both, sort) = (kernels(&graph, "route_and_sort")?, kernels(&graph, "sort")?);
        if together != (both == 1 && sort == 0) {
            return Err(format!("{both} kernels route and sort, {sort} sort").into());
        }
        let mut session = graph.compile(&ParameterStore::new(device))?;
        session.write(logits, &tensor(&self.logits)?)?;
        session.write(upstream, &tensor(&self.upstream)?)?;
        if let (Some(value), Some(bias)) = (bias, &self.bias) {
            session.write(value, &Tensor::f64([bias.len()], bias.clone())?)?;
        }
        session.poison()?;
        let got = session.run_reading(&results)?;
        if session.run_reading(&results)? != got {
            return Err("a second run is not equal bit for bit".into());
        }
        let chosen = got[0].as_i32().unwrap_or_default();
        let mut order: Vec<i32> = (0..chosen.len() as i32).collect();
        order.sort_by_key(|&pair| chosen[pair as usize]);
        let offsets: Vec<i32> = (0..=self.logits[0].len() as i32)
            .map(|expert| chosen.iter().filter(|&&other| other < expert).count() as i32)
            .collect();
        if got[3].as_i32() != Some(&order[..]) || got[4].as_i32() != Some(&offsets[..]) {
            return Err("the pairs are not sorted".into());
        }
        let top_k = self.route.top_k;
        Ok(Routed {
            experts: bits(&got[0], top_k),
            gates: bits(&got[1], top_k),
            gradient: bits(&got[2], experts),
        })
    }

    /// The same by the two operations: with masked experts up to the first number that one workgroup does not take.
    fn with_experts(&self) -> Self {
        let widened = |row: &Vec<f64>, value: f64| {
            let mut row = row.clone();
            row.resize(EXPERTS, value);
            row
        };
        Self {
            logits: self.logits.iter().map(|row| widened(row, MASKED)).collect(),
            bias: self.bias.as_ref().map(|bias| widened(bias, MASKED)),
            upstream: self.upstream.clone(),
            ..*self
        }
    }

    /// The same by the two operations: with more tokens.
    fn with_tokens(&self) -> Self {
        let lengthened = |rows: &Vec<Vec<f64>>| {
            let mut rows = rows.clone();
            rows.resize(TOKENS, rows[0].clone());
            rows
        };
        Self {
            logits: lengthened(&self.logits),
            bias: self.bias.clone(),
            upstream: lengthened(&self.upstream),
            ..*self
        }
    }
}

/// Every setting in turn.
fn setting(number: usize, top_k: usize) -> (Route, bool, Precision) {
    let bit = |bit: usize| number >> bit & 1 == 1;
    let route = Route {
        top_k,
        renormalize: !bit(0),
        score: if bit(1) {
            Score::Sigmoid
        } else {
            Score::Softmax
        },
        scale: 1.75,
    };
    let precision = if bit(3) {
        Precision::F16
    } else {
        Precision::F32
    };
    (route, bit(2), precision)
}

fn routing(popularity: Popularity, [tokens, experts, top_k]: [usize; 3], number: usize) -> Routing {
    let (route, biased, precision) = setting(number, top_k);
    let row_of = |tensor: &Tensor| -> Vec<Vec<f64>> {
        let width = tensor.shape().last();
        tensor.to_f64().chunks(width).map(<[f64]>::to_vec).collect()
    };
    let mut logits = row_of(&rows(popularity, [tokens, experts], top_k, experts));
    for (token, row) in logits.iter_mut().enumerate() {
        for (expert, logit) in row.iter_mut().enumerate() {
            // A third of the tokens has equal logits, some of them has masks.
            if token % 3 == 1 {
                *logit = (2.0 * *logit).round() / 2.0;
            }
            if token % 6 == 4 && expert % 2 == 1 {
                *logit = MASKED;
            }
        }
    }
    Routing {
        logits,
        bias: biased.then(|| floats_in(&[experts], 710, -1.0, 1.0).to_f64()),
        upstream: row_of(&floats(&[tokens, top_k], 711)),
        route,
        precision,
    }
}

fn equals_the_two_operations(device: &Device) -> Result<(), Failed> {
    let mut number = 0;
    for tokens in [1, 2, 3, 7, 133] {
        for (experts, top_k) in [
            (1, 1),
            (2, 1),
            (2, 2),
            (3, 2),
            (5, 4),
            (8, 2),
            (8, 8),
            (17, 5),
            (33, 3),
            (63, 7),
            (64, 8),
            (64, 1),
        ] {
            for popularity in Popularity::ALL {
                let routing = routing(popularity, [tokens, experts, top_k], number);
                let together = routing.run(device, experts, true)?;
                if together != routing.with_experts().run(device, experts, false)? {
                    return Err(format!(
                        "{tokens} tokens, {experts} experts, top {top_k}, {popularity:?}, setting {number}"
                    )
                    .into());
                }
                number += 1;
            }
        }
    }
    Ok(())
}

fn equals_the_two_operations_at_the_limits(device: &Device) -> Result<(), Failed> {
    for (number, popularity) in Popularity::ALL.into_iter().enumerate() {
        for sizes in [[4096, 64, 8], [4096, 8, 2]] {
            let mut routing = routing(popularity, sizes, number);
            // Checked mode takes neither.
            if number == 0 && !device.is_checked() {
                // Not chosen, whatever they are.
                for row in routing.logits.iter_mut().step_by(5) {
                    row[3] = f64::NEG_INFINITY;
                    row[7] = f64::NAN;
                    row[..3].fill(0.0);
                    row[4] = 0.0;
                }
            }
            let together = routing.run(device, sizes[1], true)?;
            let mut apart = routing.with_tokens().run(device, sizes[1], false)?;
            for rows in [&mut apart.experts, &mut apart.gates, &mut apart.gradient] {
                rows.truncate(sizes[0]);
            }
            if together != apart {
                return Err(format!("{sizes:?}, {popularity:?}").into());
            }
        }
    }
    Ok(())
}

/// Where one launch is enough, and where it is not.
fn the_limits_are_where_they_are_said_to_be() -> Result<(), Failed> {
    let capabilities = Capabilities::webgpu_defaults();
    for (tokens, experts, top_k, one) in [
        (512, 8, 2, true),
        (1, 1, 1, true),
        (4096, 64, 8, true),
        (4097, 64, 8, false),
        (4096, 65, 8, false),
        (4096, 64, 9, false),
        (562, 64, 64, true),
        (563, 64, 64, false),
    ] {
        let mut graph = Graph::new();
        let logits = graph.input("logits", TensorType::f32([tokens, experts]))?;
        let routed = graph.route(logits, top_k, true)?;
        graph.output(routed.gates)?;
        graph.output(routed.segments.order())?;
        let launches = graph.launches(&capabilities, false)?.len();
        if (launches == 1) != one {
            return Err(format!(
                "{tokens} tokens, {experts} experts, top {top_k}: {launches} launches"
            )
            .into());
        }
    }
    for (count, limit, expected) in [
        (1024, 8, 1),
        (36_864, 1, 1),
        (36_865, 1, 3),
        (34_848, 65, 1),
        (34_849, 65, 3),
        (8352, 256, 1),
        (8353, 256, 3),
        (1, 257, 7),
        (1_000_000, 4096, 7),
    ] {
        let mut graph = Graph::new();
        let keys = graph.input("keys", TensorType::i32([count]))?;
        let sorted = graph.sort_by_key(keys, limit)?;
        graph.output(sorted.order)?;
        let launches = graph.launches(&capabilities, false)?.len();
        if launches != expected {
            return Err(format!("{count} keys of {limit}: {launches} launches").into());
        }
    }
    Ok(())
}

/// A million pairs of 4,096 experts need little more memory than the pairs.
fn scratch_does_not_grow_with_experts(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let keys = graph.input("keys", TensorType::i32([1_000_000]))?;
    let sorted = graph.sort_by_key(keys, 4096)?;
    graph.output(sorted.order)?;
    graph.output(sorted.offsets)?;
    let session = graph.compile(&ParameterStore::new(device))?;
    // The order, and the order after the first pass.
    let (pool, orders) = (session.memory().pool, 2 * 4_000_000);
    if pool > orders + 200_000 {
        return Err(format!("{pool} bytes").into());
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test(
        "route_and_sort::the_limits_are_where_they_are_said_to_be",
        the_limits_are_where_they_are_said_to_be,
    )];
    type Check = fn(&Device) -> Result<(), Failed>;
    let checks: [(&str, Check); 3] = [
        ("equals_the_two_operations", equals_the_two_operations),
        (
            "equals_the_two_operations_at_the_limits",
            equals_the_two_operations_at_the_limits,
        ),
        (
            "scratch_does_not_grow_with_experts",
            scratch_does_not_grow_with_experts,
        ),
    ];
    for (name, check) in checks {
        trials.extend(devices::trials(&format!("route_and_sort::{name}"), check));
    }
    trials
}
