//! Facts about CoMoL layers, and layers of random shapes against the reference.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{Capabilities, Launch, Launches, Shader, Slot};
use rankmix::layers::{AdapterOptions, CoMol, CoMolOutput, CoreRouting, DecoderWidths, Linear};
use rankmix::ops::{CoreMix, LaunchTypes, Routed};
use rankmix::{
    Device, Error, Graph, HostIo, Op, ParameterStore, Real, Result, Tensor, TensorType, Value,
    host_reference,
};

use crate::case::{floats, floats_in};
use crate::devices;
use crate::metrics::relative_errors;
use crate::popularity::{Popularity, router, rows};

const ALPHA: f32 = 12.0;

/// A CoMoL layer of any shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub tokens: usize,
    pub d_in: usize,
    pub d_out: usize,
    pub rank: usize,
    pub experts: usize,
    /// 0 is a dense gate.
    pub top_k: usize,
    pub routing: CoreRouting,
    pub mix: CoreMix,
    /// Where a sparse gate sends the tokens; `None`: wherever random weights do.
    pub popularity: Option<Popularity>,
}

/// The parameters of a layer, by what follows its name.
pub type Parameters = Vec<(&'static str, Tensor)>;

impl Shape {
    fn layer(&self) -> Result<CoMol> {
        let layer = CoMol::new(
            Linear::new("layer", self.d_in, self.d_out),
            AdapterOptions::new(self.rank, ALPHA),
            self.experts,
        )?
        .with_routing(self.routing)
        .with_mix(self.mix);
        match self.top_k {
            0 => Ok(layer),
            top_k => layer.with_top_k(top_k),
        }
    }

    fn x(&self) -> Tensor {
        let dims = [self.tokens, self.d_in];
        match self.popularity {
            Some(popularity) => rows(popularity, dims, self.top_k, self.experts),
            None => floats(&dims, 410),
        }
    }

    pub fn parameters(&self) -> Parameters {
        let Self {
            d_in,
            d_out,
            rank,
            experts,
            ..
        } = *self;
        let scaled = |dims: &[usize], seed: u64, factor: f64| {
            let spread = factor / (*dims.last().unwrap_or(&1) as f64).sqrt();
            floats_in(dims, seed, -spread, spread)
        };
        let width = match self.routing {
            CoreRouting::Core => rank,
            CoreRouting::Raw => d_in,
        };
        // A router that looks at one coordinate for each expert; with core routing A passes those on.
        let passing = |count: usize, width: usize, otherwise: Tensor| match self.popularity {
            Some(_) => router(count, width),
            None => otherwise,
        };
        let mut lora_a = scaled(&[rank, d_in], 402, 1.7);
        if self.routing == CoreRouting::Core {
            lora_a = passing(rank, d_in, lora_a);
        }
        vec![
            ("weight", scaled(&[d_out, d_in], 401, 1.0)),
            ("lora_a", lora_a),
            ("lora_b", scaled(&[d_out, rank], 403, 1.0)),
            ("core", scaled(&[experts, rank, rank], 404, 1.7)),
            // Logits far apart: rounding must not decide which experts are chosen.
            (
                "router",
                passing(experts, width, scaled(&[experts, width], 405, 6.0)),
            ),
        ]
    }

    /// Output, the experts chosen (or the gates, if dense), and the gradients of x and of the parameters, in their order.
    pub fn run(&self, device: &Device, parameters: &Parameters) -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([self.tokens, self.d_in]))?;
        let CoMolOutput {
            output,
            gates,
            router,
            ..
        } = self.layer()?.forward(&mut graph, x)?;
        let upstream = graph.constant(floats(&[self.tokens, self.d_out], 400))?;
        let store = ParameterStore::new(device);
        let mut wanted = vec![x];
        for (name, tensor) in parameters {
            let name = format!("layer.{name}");
            store.insert(&name, tensor)?;
            wanted.push(graph.named(&name)?);
        }
        let gradients = graph.gradients_from(&[(output, upstream)], &wanted)?;
        let values: Vec<Value> = [
            output,
            router.map_or(gates, |router| router.routed.experts()),
        ]
        .into_iter()
        .chain(gradients)
        .collect();
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.poison()?;
        session.write(x, &self.x())?;
        let results = session.run_reading(&values)?;
        assert_eq!(
            results,
            session.run_reading(&values)?,
            "a second run is not equal bit for bit"
        );
        Ok(results)
    }
}

/// Where the gradient of the router is in the results of [`Shape::run`].
pub const ROUTER: usize = 7;

fn close(what: &str, got: &Tensor, want: &Tensor, slack: f64) -> Result<(), String> {
    if want.as_i32().is_some() {
        return if got == want {
            Ok(())
        } else {
            Err(format!("{what}: other experts were chosen"))
        };
    }
    let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
    if norm > slack * 1e-5 || largest > slack * 1e-4 {
        return Err(format!(
            "{what}: {norm:.2e} in norm, {largest:.2e} of the largest"
        ));
    }
    Ok(())
}

pub fn all_close(what: &str, got: &[Tensor], want: &[Tensor], tokens: usize) -> Result<(), String> {
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        // With few tokens the router's gradient is a difference of nearly equal numbers that nothing averages out.
        let slack = if index == ROUTER && tokens < 8 {
            20.0
        } else {
            1.0
        };
        close(&format!("{what}, result {index}"), got, want, slack)?;
    }
    Ok(())
}

const MIDDLE: Shape = Shape {
    tokens: 37,
    d_in: 44,
    d_out: 31,
    rank: 7,
    experts: 9,
    top_k: 0,
    routing: CoreRouting::Core,
    mix: CoreMix::Auto,
    popularity: None,
};

/// `a b` of row-major matrices with `n` columns of `b`.
fn product(a: &[f64], b: &[f64], k: usize, n: usize) -> Vec<f64> {
    a.chunks(k)
        .flat_map(|row| {
            (0..n).map(move |j| {
                row.iter()
                    .zip(b[j..].iter().step_by(n))
                    .map(|(a, b)| a * b)
                    .sum()
            })
        })
        .collect()
}

fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns)
        .flat_map(|j| a[j..].iter().step_by(columns).copied())
        .collect()
}

/// One expert: a linear layer with the weight `W + s B Mᵀ A`, whose gates are 1.
fn one_expert_is_b_m_a(device: &Device, top_k: usize) -> Result<(), Failed> {
    let shape = Shape {
        experts: 1,
        top_k,
        ..MIDDLE
    };
    let parameters = shape.parameters();
    let [weight, a, b, core] = [0, 1, 2, 3].map(|index| parameters[index].1.to_f64());
    let (d_in, rank) = (shape.d_in, shape.rank);
    let m_a = product(&transposed(&core, rank), &a, rank, d_in);
    let change = product(&b, &m_a, rank, d_in);
    let factor = f64::from(ALPHA) / rank as f64;
    let merged: Vec<f64> = weight
        .iter()
        .zip(&change)
        .map(|(w, c)| w + factor * c)
        .collect();
    let y = product(
        &shape.x().to_f64(),
        &transposed(&merged, d_in),
        d_in,
        shape.d_out,
    );
    let want = Tensor::f64([shape.tokens, shape.d_out], y)?;
    let results = shape.run(device, &parameters)?;
    close("the output", &results[0], &want, 1.0)?;
    if results[ROUTER].to_f64().iter().any(|&x| x != 0.0) {
        return Err("a router with one expert has a gradient".into());
    }
    Ok(())
}

/// Merging first equals mixing afterwards: the outputs and all gradients.
fn merging_equals_mixing(device: &Device) -> Result<(), Failed> {
    for (experts, top_k, rank) in [(9, 0, 7), (3, 0, 16), (40, 0, 4), (9, 2, 8), (12, 10, 5)] {
        let of = |mix| Shape {
            experts,
            top_k,
            rank,
            mix,
            ..MIDDLE
        };
        let parameters = of(CoreMix::Auto).parameters();
        let [auto, merged, mixed] = [CoreMix::Auto, CoreMix::Merge, CoreMix::Apply]
            .map(|mix| of(mix).run(device, &parameters));
        let (auto, merged, mixed) = (auto?, merged?, mixed?);
        let what = format!("{experts} experts, top {top_k}, rank {rank}");
        all_close(&what, &merged, &mixed, MIDDLE.tokens)?;
        if auto != merged && auto != mixed {
            return Err(format!("{what}: the choice by shape is neither of the two").into());
        }
    }
    Ok(())
}

/// The rows of the leading dimension in another order.
fn permuted(tensor: &Tensor, order: &[usize]) -> Tensor {
    let rows = tensor.to_f64();
    let size = rows.len() / order.len();
    let data = order
        .iter()
        .flat_map(|&row| rows[row * size..(row + 1) * size].to_vec());
    Tensor::f64(tensor.shape(), data.collect()).expect("as many rows as before")
}

/// Experts in another order change neither the output nor any gradient but the order of their own.
fn the_order_of_experts_is_nothing(device: &Device, top_k: usize) -> Result<(), Failed> {
    let shape = Shape { top_k, ..MIDDLE };
    let order = [4, 8, 0, 3, 1, 7, 2, 6, 5];
    let of_experts = |name: &str| name == "core" || name == "router";
    let parameters = shape.parameters();
    let other: Parameters = parameters
        .iter()
        .map(|(name, tensor)| {
            let tensor = if of_experts(name) {
                permuted(tensor, &order)
            } else {
                tensor.clone()
            };
            (*name, tensor)
        })
        .collect();
    let one = shape.run(device, &parameters)?;
    let two = shape.run(device, &other)?;
    close("the output", &two[0], &one[0], 1.0)?;
    close("the gradient of x", &two[2], &one[2], 1.0)?;
    for (index, (name, _)) in parameters.iter().enumerate() {
        let (one, two) = (&one[3 + index], &two[3 + index]);
        let one = if of_experts(name) {
            permuted(one, &order)
        } else {
            one.clone()
        };
        close(name, two, &one, 1.0)?;
    }
    Ok(())
}

/// Two layers on the same input, sharing A and B or with equal ones of their own: outputs are equal, and the gradient of what is
/// shared is the sum.
fn sharing_adds_gradients(device: &Device) -> Result<(), Failed> {
    let (tokens, d_in, d_out, rank) = (17, 20, 12, 6);
    let run = |shared: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([tokens, d_in]))?;
        let store = ParameterStore::new(device);
        let mut upstream = Vec::new();
        for (index, name) in ["first", "second"].into_iter().enumerate() {
            let base = Linear::new(name, d_in, d_out);
            let layer = CoMol::new(base, AdapterOptions::new(rank, ALPHA), 3)?;
            let layer = if shared { layer.sharing("both") } else { layer };
            let y = layer.forward(&mut graph, x)?.output;
            let dy = graph.constant(floats(&[tokens, d_out], 420 + index as u64))?;
            upstream.push((y, dy));
        }
        store.initialize(&graph, 9)?;
        let names = |end: &str| -> Vec<String> {
            let prefixes: &[&str] = if shared {
                &["both"]
            } else {
                &["first", "second"]
            };
            prefixes
                .iter()
                .map(|name| format!("{name}.{end}"))
                .collect()
        };
        for name in names("lora_a") {
            store.insert(&name, &floats(&[rank, d_in], 422))?;
        }
        for name in names("lora_b") {
            store.insert(&name, &floats(&[d_out, rank], 423))?;
        }
        for (seed, name) in ["first", "second"].into_iter().enumerate() {
            let seed = seed as u64;
            store.insert(
                &format!("{name}.core"),
                &floats(&[3, rank, rank], 424 + seed),
            )?;
            store.insert(&format!("{name}.router"), &floats(&[3, rank], 426 + seed))?;
            store.insert(
                &format!("{name}.weight"),
                &floats(&[d_out, d_in], 428 + seed),
            )?;
        }
        let mut values: Vec<Value> = upstream.iter().map(|&(y, _)| y).collect();
        for end in ["lora_a", "lora_b"] {
            let parameters: Vec<Value> = names(end)
                .iter()
                .map(|name| graph.named(name))
                .collect::<Result<_>>()?;
            let gradients = graph.gradients_from(&upstream, &parameters)?;
            let mut sum = gradients[0];
            for &gradient in &gradients[1..] {
                sum = graph.add(sum, gradient)?;
            }
            values.push(sum);
        }
        for &value in &values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&store)?;
        session.write(x, &floats(&[tokens, d_in], 430))?;
        session.run_reading(&values)
    };
    let (shared, apart) = (run(true)?, run(false)?);
    if shared[..2] != apart[..2] {
        return Err("the outputs are not equal bit for bit".into());
    }
    close("the gradient of A", &shared[2], &apart[2], 1.0)?;
    close("the gradient of B", &shared[3], &apart[3], 1.0)?;
    Ok(())
}

/// Integers as they are: what an operation computes is not checked against a range, as what the host writes is.
#[derive(Clone, Copy, Debug)]
struct Computed;

const COMPUTED: Shader = Shader {
    name: "test_computed",
    source: "
struct Params { count: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> given: array<u32>;
@group(0) @binding(2) var<storage, read_write> result: array<u32>;
@compute @workgroup_size(1)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>) {
  if (workgroup.x < params.count) { result[workgroup.x] = given[workgroup.x]; }
}
",
};

impl Computed {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let given = io.ints(0)?;
        io.ints_out(0)?.copy_from_slice(given);
        Ok(())
    }
}

impl Op for Computed {
    fn name(&self) -> &'static str {
        "test_computed"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Ok(inputs.to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, _: &Capabilities) -> Result<Launches> {
        let count = io.inputs[0].elements();
        let launch = Launch::new(COMPUTED, "forward")
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .param(count)
            .grid([count as u32, 1, 1]);
        Ok(launch.into())
    }

    host_reference!();
}

/// A pair whose expert is none has no part in u and dz, and its gate no gradient, as if the gate were 0.
fn an_expert_past_the_last_is_skipped(device: &Device, mix: CoreMix) -> Result<(), Failed> {
    let (tokens, experts, top_k, rank) = (19, 5, 2, 6);
    let run = |past: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        let z = graph.input("z", TensorType::f32([tokens, rank]))?;
        let core = graph.constant(floats(&[experts, rank, rank], 440))?;
        let mut gates = floats_in(&[tokens, top_k], 441, 0.1, 1.0).to_f32();
        let mut chosen: Vec<i32> = (0..tokens * top_k).map(|p| (p % experts) as i32).collect();
        for pair in (0..tokens * top_k).step_by(3) {
            if past {
                chosen[pair] = [experts as i32, 1_000_000, -1][pair % 9 / 3];
            } else {
                gates[pair] = 0.0;
            }
        }
        let gates = graph.constant(Tensor::f32([tokens, top_k], gates)?)?;
        let given = graph.input("chosen", TensorType::i32([tokens, top_k]))?;
        let computed = graph.apply(Computed, &[given])?[0];
        let segments = graph.segments(computed, experts)?;
        let u = graph.mix_routed_cores(z, core, Routed { gates, segments }, mix)?;
        let du = graph.constant(floats(&[tokens, rank], 442))?;
        let gradients = graph.gradients_from(&[(u, du)], &[z, gates])?;
        let values = [u, gradients[0], gradients[1]];
        for value in values {
            graph.output(value)?;
        }
        let mut session = graph.compile(&ParameterStore::new(device))?;
        session.write(z, &floats(&[tokens, rank], 443))?;
        session.write(given, &Tensor::i32([tokens, top_k], chosen)?)?;
        session.run_reading(&values)
    };
    let (skipped, zeroed) = (run(true)?, run(false)?);
    if skipped[..2] != zeroed[..2] {
        return Err("u or dz has a part of a pair without an expert".into());
    }
    for (pair, (&got, &other)) in (skipped[2].to_f32().iter())
        .zip(&zeroed[2].to_f32())
        .enumerate()
    {
        let want = if pair % 3 == 0 { 0.0 } else { other };
        if got != want {
            return Err(format!("the gradient of gate {pair} is {got}, not {want}").into());
        }
    }
    Ok(())
}

/// What cannot be shared, chosen or balanced is a typed error.
fn mistakes_are_typed_errors() -> Result<(), Failed> {
    let options = AdapterOptions::new(4, 4.0);
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([2, 8]))?;
    let wide = CoMol::new(Linear::new("wide", 8, 16), options, 2)?.sharing("attention");
    let narrow = CoMol::new(Linear::new("narrow", 8, 4), options, 2)?;
    let output = wide.forward(&mut graph, x)?;
    let refused = narrow.clone().sharing("attention").forward(&mut graph, x);
    if !matches!(&refused, Err(Error::DuplicateName { name, .. }) if name == "attention.lora_b") {
        return Err(format!("sharing B between widths 16 and 4 gave {refused:?}").into());
    }
    narrow
        .clone()
        .sharing_a("attention")
        .forward(&mut graph, x)?;
    let refused = output.auxiliary_loss(&mut graph, 0.01, 0.0);
    if !matches!(refused, Err(Error::Setting { .. })) {
        return Err(format!("balancing a dense gate gave {refused:?}").into());
    }
    output.auxiliary_loss(&mut graph, 0.0, 0.01)?;
    for top_k in [0, 3] {
        let refused = narrow.clone().with_top_k(top_k);
        if !matches!(refused, Err(Error::Setting { .. })) {
            return Err(format!("top {top_k} of 2 experts gave {refused:?}").into());
        }
    }
    let refused = CoMol::new(Linear::new("none", 8, 4), options, 0);
    if !matches!(refused, Err(Error::Setting { .. })) {
        return Err(format!("no experts gave {refused:?}").into());
    }
    Ok(())
}

/// The counts of trainable parameters that the paper prints, in millions with two decimals.
fn published_counts() -> Result<(), Failed> {
    let model = |layers, hidden, intermediate| DecoderWidths {
        layers,
        hidden,
        query: hidden,
        key_value: 1024,
        intermediate,
    };
    let qwen3_8b = model(36, 4096, 12288);
    let qwen3_14b = model(40, 5120, 17408);
    let llama_8b = model(32, 4096, 14336);
    for (model, experts, published, exact) in [
        (qwen3_8b, 8, "25.16", 25_164_288),
        (qwen3_8b, 64, "27.91", 27_906_048),
        (qwen3_14b, 8, "35.82", 35_824_640),
        (llama_8b, 4, "23.24", 23_242_752),
    ] {
        let layers = model.comol(AdapterOptions::new(16, 16.0), experts)?;
        let count = CoMol::trainable_elements_of(&layers);
        if format!("{:.2}", count as f64 / 1e6) != published || count != exact {
            return Err(format!("{model:?}, {experts} experts: {count}, not {published} M").into());
        }
    }
    // The count is what a graph declares.
    for (routing, top_k) in [(CoreRouting::Core, 0), (CoreRouting::Raw, 2)] {
        let shape = Shape {
            routing,
            top_k,
            ..MIDDLE
        };
        let mut graph = Graph::new();
        let x = graph.input("x", TensorType::f32([shape.tokens, shape.d_in]))?;
        shape.layer()?.forward(&mut graph, x)?;
        let (counted, declared) = (
            shape.layer()?.trainable_elements(),
            graph.trainable_elements(),
        );
        if counted != declared {
            return Err(format!("{routing:?}: counted {counted}, declared {declared}").into());
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("comol::published_parameter_counts", published_counts),
        Trial::test(
            "comol::mistakes_are_typed_errors",
            mistakes_are_typed_errors,
        ),
    ];
    for (gate, top_k) in [("dense", 0), ("top_1", 1)] {
        trials.extend(devices::trials(
            &format!("comol::one_expert_is_b_m_a_{gate}"),
            move |device| one_expert_is_b_m_a(device, top_k),
        ));
    }
    for (gate, top_k) in [("dense", 0), ("top_3", 3)] {
        trials.extend(devices::trials(
            &format!("comol::the_order_of_experts_is_nothing_{gate}"),
            move |device| the_order_of_experts_is_nothing(device, top_k),
        ));
    }
    for mix in [CoreMix::Merge, CoreMix::Apply] {
        trials.extend(devices::trials(
            &format!("comol::an_expert_past_the_last_is_skipped_{mix:?}"),
            move |device| an_expert_past_the_last_is_skipped(device, mix),
        ));
    }
    trials.extend(devices::trials(
        "comol::merging_equals_mixing",
        merging_equals_mixing,
    ));
    trials.extend(devices::trials(
        "comol::sharing_adds_gradients",
        sharing_adds_gradients,
    ));
    trials
}
