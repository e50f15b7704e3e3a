//! Facts about dropout: whose random numbers it has, that they are the same on every device, what it leaves alone.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{Capabilities, Launch, Launches, Shader, Slot};
use rankmix::layers::{
    AdapterOptions, CoMol, CoreRouting, Linear, Lora, MoeLora, RotMole, Routing,
};
use rankmix::ops::{LaunchTypes, threefry};
use rankmix::train::AdamW;
use rankmix::{
    Device, Error, Graph, HostIo, Op, ParameterStore, Real, Result, Tensor, TensorType, Value,
    host_reference,
};

use crate::case::floats;
use crate::devices;

fn expect(found: bool, message: impl Into<String>) -> Result<(), Failed> {
    if found {
        Ok(())
    } else {
        Err(message.into().into())
    }
}

/// Key, counter and the words that they give, from the authors' file of known answers.
const KNOWN: [[[u32; 2]; 3]; 3] = [
    [[0, 0], [0, 0], [0x6b20_0159, 0x99ba_4efe]],
    [
        [u32::MAX, u32::MAX],
        [u32::MAX, u32::MAX],
        [0x1cb9_96fc, 0xbb00_2be7],
    ],
    [
        [0x1319_8a2e, 0x0370_7344],
        [0x243f_6a88, 0x85a3_08d3],
        [0xc492_3a9c, 0x483d_f7a0],
    ],
];

/// The generator alone: input `[n, 4]` of key and counter, output `[n, 2]`.
#[derive(Clone, Copy, Debug)]
struct Threefry;

const SHADER: Shader = Shader {
    name: "test_threefry",
    source: concat!(
        include_str!("../../shaders/parts/threefry.wgsl"),
        "
struct Params { count: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> words: array<vec2<u32>>;
@compute @workgroup_size(1)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>) {
  if (workgroup.x >= params.count) { return; }
  words[workgroup.x] = threefry(input[workgroup.x].xy, input[workgroup.x].zw);
}
"
    ),
};

impl Threefry {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let input: Vec<u32> = io.ints(0)?.iter().map(|&word| word as u32).collect();
        for (out, input) in io.ints_out(0)?.chunks_mut(2).zip(input.chunks(4)) {
            let words = threefry([input[0], input[1]], [input[2], input[3]]);
            out.copy_from_slice(&words.map(|word| word as i32));
        }
        Ok(())
    }
}

impl Op for Threefry {
    fn name(&self) -> &'static str {
        "test_threefry"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Ok(vec![TensorType::i32([inputs[0].dims()[0], 2])])
    }

    fn launches(&self, io: LaunchTypes<'_>, _: &Capabilities) -> Result<Launches> {
        let count = io.inputs[0].dims()[0];
        let launch = Launch::new(SHADER, "forward")
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .param(count)
            .grid([count as u32, 1, 1]);
        Ok(launch.into())
    }

    host_reference!();
}

fn known_answers(device: &Device) -> Result<(), Failed> {
    let input = KNOWN
        .iter()
        .flat_map(|[key, counter, _]| [key[0], key[1], counter[0], counter[1]]);
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::i32([3, 4]))?;
    let words = graph.apply(Threefry, &[x])?[0];
    graph.output(words)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::i32([3, 4], input.map(|w| w as i32).collect())?)?;
    let got = session.run_reading(&[words])?.remove(0);
    let want: Vec<i32> = KNOWN
        .iter()
        .flat_map(|[_, _, words]| words.map(|w| w as i32))
        .collect();
    expect(got.as_i32() == Some(&want), format!("{got:x?}"))
}

/// A dropout of ones after one of nothing, so that its stream is 1.
fn dropped_ones(
    device: &Device,
    count: usize,
    probability: f32,
    random: (u32, u32),
) -> Result<Vec<f32>> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([count]))?;
    graph.dropout(x, 0.5)?;
    let y = graph.dropout(x, probability)?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::f32([count], vec![1.0; count])?)?;
    session.set_random(random.0, random.1)?;
    Ok(session.run_reading(&[y])?.remove(0).to_f32())
}

/// The mask is the one that the documentation describes, to the bit; the kept are scaled; their number is about what it should be.
fn the_mask_is_the_documented_one(device: &Device) -> Result<(), Failed> {
    let (count, seed, step) = (50_001, 7, u32::MAX);
    for probability in [0.1_f32, 0.5, 0.9, 1.0 - f32::EPSILON / 2.0] {
        let y = dropped_ones(device, count, probability, (seed, step))?;
        let threshold = (f64::from(probability) * 2.0_f64.powi(32)).round() as u32;
        let mut kept = 0;
        for (q, &y) in y.iter().enumerate() {
            let keep = threefry([seed, step], [q as u32 / 2, 1])[q % 2] >= threshold;
            let scaled = (y * (1.0 - probability) - 1.0).abs() < 1e-6;
            if if keep { !scaled } else { y.to_bits() != 0 } {
                return Err(format!("p {probability}, element {q}: {y}, kept: {keep}").into());
            }
            kept += usize::from(keep);
        }
        // Five standard deviations.
        let expected = count as f64 * (1.0 - f64::from(probability));
        let margin = 5.0 * (expected * f64::from(probability)).sqrt() + 1.0;
        expect(
            (kept as f64 - expected).abs() <= margin,
            format!("p {probability}: {kept} kept, expected {expected} to {margin}"),
        )?;
    }
    Ok(())
}

/// Jitter stays within its bounds and is spread over them.
fn jitter_is_uniform(device: &Device) -> Result<(), Failed> {
    let (count, epsilon) = (20_000, 0.25);
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([count]))?;
    let y = graph.jitter(x, epsilon)?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::f32([count], vec![1.0; count])?)?;
    let y = session.run_reading(&[y])?.remove(0).to_f64();
    let mut tenths = [0_usize; 10];
    for y in y {
        let u = (y - 0.75) / 0.5;
        expect(
            (-1e-6..=1.0 + 1e-6).contains(&u),
            format!("a factor of {y}"),
        )?;
        tenths[((u * 10.0) as usize).min(9)] += 1;
    }
    // 2000 each; five standard deviations are 212.
    expect(
        tenths.iter().all(|&hits| hits.abs_diff(2000) < 212),
        format!("{tenths:?}"),
    )
}

/// The gradient is dropped where the value was.
fn the_gradient_has_the_same_mask(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([999]))?;
    let y = graph.dropout(x, 0.4)?;
    let ones = graph.constant(Tensor::f32([999], vec![1.0; 999])?)?;
    let dx = graph.gradients_from(&[(y, ones)], &[x])?[0];
    graph.output(y)?;
    graph.output(dx)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::f32([999], vec![1.0; 999])?)?;
    let results = session.run_reading(&[y, dx])?;
    expect(
        results[0] == results[1],
        "the mask of the gradient is another",
    )?;
    let dropped = results[0].to_f32().iter().filter(|&&y| y == 0.0).count();
    expect(
        (300..500).contains(&dropped),
        format!("{dropped} of 999 dropped"),
    )
}

/// Runs differ from step to step and from seed to seed, and are equal for equal seed and step.
fn steps_differ_and_repeat(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([256]))?;
    let (a, b) = (graph.dropout(x, 0.5)?, graph.dropout(x, 0.5)?);
    graph.output(a)?;
    graph.output(b)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.write(x, &Tensor::f32([256], vec![1.0; 256])?)?;
    expect(
        session.random() == Some((0, 0)),
        format!("starts at {:?}", session.random()),
    )?;
    let first = session.run_reading(&[a, b])?;
    expect(first[0] != first[1], "two dropouts have one mask")?;
    let second = session.run_reading(&[a, b])?;
    expect(
        first[0] != second[0] && first[1] != second[1],
        "two steps have one mask",
    )?;
    expect(
        session.random() == Some((0, 2)),
        format!("after two runs at {:?}", session.random()),
    )?;
    session.set_random(1, 0)?;
    let other = session.run_reading(&[a, b])?;
    expect(first[0] != other[0], "two seeds have one mask")?;
    session.set_random(0, 1)?;
    let again = session.run_reading(&[a, b])?;
    expect(second == again, "step 1 is not equal bit for bit")?;
    // Written as an input, it is the same thing.
    session.set("rankmix.random", &Tensor::i32([2], vec![0, 0])?)?;
    let again = session.run_reading(&[a, b])?;
    expect(first == again, "step 0 is not equal bit for bit")
}

/// A fact about noise on a device.
type Fact = fn(&Device) -> Result<(), Failed>;

/// The output of a layer, and its router's logits if it has any.
type Forward = fn(&mut Graph, Value, AdapterOptions) -> Result<(Value, Option<Value>)>;

fn base() -> Linear {
    Linear::new("layer", 24, 18)
}

const LAYERS: [(&str, Forward); 5] = [
    ("lora", |graph, x, options| {
        Ok((Lora::new(base(), options)?.forward(graph, x)?, None))
    }),
    ("moe_lora", |graph, x, options| {
        let layer = MoeLora::new(base(), options, Routing::new(4, 2))?;
        let routed = layer.forward(graph, x)?;
        Ok((routed.output, Some(routed.logits)))
    }),
    ("rotmole", |graph, x, options| {
        let layer = RotMole::new(base(), options, Routing::new(4, 2))?;
        let routed = layer.forward(graph, x)?;
        Ok((routed.output, Some(routed.logits)))
    }),
    ("comol_raw", |graph, x, options| {
        let layer = CoMol::new(base(), options, 4)?.with_routing(CoreRouting::Raw);
        let output = layer.forward(graph, x)?;
        Ok((output.output, Some(output.logits)))
    }),
    ("comol_core", |graph, x, options| {
        Ok((
            CoMol::new(base(), options, 4)?.forward(graph, x)?.output,
            None,
        ))
    }),
];

/// Dropout changes what the adapter adds, in training; nothing else, and nothing in evaluation.
fn only_the_adapter_in_training(device: &Device, forward: Forward) -> Result<(), Failed> {
    let run = |training: bool, probability: f32, expand: bool| -> Result<Vec<Tensor>> {
        let mut graph = Graph::new();
        graph.set_training(training);
        let x = graph.input("x", TensorType::f32([19, 24]))?;
        let options = AdapterOptions::new(6, 12.0).with_dropout(probability);
        let (output, logits) = forward(&mut graph, x, options)?;
        let values: Vec<Value> = [output].into_iter().chain(logits).collect();
        for &value in &values {
            graph.output(value)?;
        }
        let store = ParameterStore::new(device);
        store.initialize(&graph, 3)?;
        if expand {
            let b = graph.named("layer.lora_b")?;
            let dims = graph.ty(b)?.dims().to_vec();
            store.insert("layer.lora_b", &floats(&dims, 450))?;
        }
        let mut session = graph.compile(&store)?;
        assert_eq!(
            session.random().is_some(),
            training && probability > 0.0,
            "a session has noise exactly when it drops"
        );
        session.write(x, &floats(&[19, 24], 451))?;
        session.run_reading(&values)
    };
    let plain = run(true, 0.0, true)?;
    let (evaluated, trained) = (run(false, 0.5, true)?, run(true, 0.5, true)?);
    expect(evaluated == plain, "dropout acts in evaluation")?;
    expect(trained[0] != plain[0], "dropout does nothing in training")?;
    expect(trained[1..] == plain[1..], "dropout reaches the router")?;
    // With B = 0 only the layer underneath is left.
    expect(
        run(true, 0.5, false)?[0] == run(true, 0.0, false)?[0],
        "dropout reaches the layer underneath",
    )
}

/// Six steps of training with dropout: the losses, the parameters after them.
fn train(device: &Device, forward: Forward, seed: u32) -> Result<Vec<Tensor>> {
    let mut graph = Graph::new();
    graph.set_training(true);
    let x = graph.input("x", TensorType::f32([19, 24]))?;
    let labels = graph.input("labels", TensorType::i32([19]))?;
    let options = AdapterOptions::new(6, 12.0).with_dropout(0.3);
    let (logits, _) = forward(&mut graph, x, options)?;
    let loss = graph.cross_entropy(logits, labels)?;
    graph.output(loss)?;
    let gradients = graph.backward(loss)?;
    let mut optimizer = AdamW::default().add_to(&mut graph, &gradients)?;
    let store = ParameterStore::new(device);
    store.initialize(&graph, 3)?;
    let mut session = graph.compile(&store)?;
    session.poison()?;
    session.write(x, &floats(&[19, 24], 451))?;
    session.write(
        labels,
        &Tensor::i32([19], (0..19).map(|i| i % 18).collect())?,
    )?;
    session.set_random(seed, 0)?;
    let mut results = Vec::new();
    for _ in 0..6 {
        optimizer.prepare(&mut session, 0.01)?;
        results.extend(session.run_reading(&[loss])?);
    }
    results.push(store.read("layer.lora_b")?);
    Ok(results)
}

fn training_repeats(device: &Device, forward: Forward) -> Result<(), Failed> {
    let first = train(device, forward, 5)?;
    expect(
        first == train(device, forward, 5)?,
        "two trainings of one seed are not equal bit for bit",
    )?;
    expect(
        first[1..] != train(device, forward, 6)?[1..],
        "two trainings of two seeds are equal",
    )?;
    let losses: Vec<f32> = first[..6].iter().map(|loss| loss.to_f32()[0]).collect();
    expect(
        losses[5] < losses[0],
        format!("nothing was learned: {losses:?}"),
    )
}

fn mistakes_are_typed_errors() -> Result<(), Failed> {
    let setting = |found: Result<(), Error>| matches!(found, Err(Error::Setting { .. }));
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([2]))?;
    for probability in [1.0, -0.1, f32::NAN, f32::INFINITY] {
        expect(
            setting(graph.dropout(x, probability).map(drop)),
            format!("a dropout of {probability} passed"),
        )?;
        expect(
            setting(graph.jitter(x, probability).map(drop)),
            format!("a jitter of {probability} passed"),
        )?;
        let options = AdapterOptions::new(2, 2.0).with_dropout(probability);
        expect(
            setting(Lora::new(base(), options).map(drop)),
            format!("an adapter with a dropout of {probability} passed"),
        )?;
    }
    expect(graph.dropout(x, 0.0)? == x, "a dropout of 0 is something")?;
    let mut graph = Graph::new();
    let x = graph.input("rankmix.random", TensorType::f32([2]))?;
    let found = graph.dropout(x, 0.5);
    expect(
        matches!(&found, Err(Error::DuplicateName { .. })),
        format!("an input that has the name of the seed: {found:?}"),
    )
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test(
        "noise::mistakes_are_typed_errors",
        mistakes_are_typed_errors,
    )];
    let facts: [(&str, Fact); 5] = [
        ("known_answers", known_answers),
        (
            "the_mask_is_the_documented_one",
            the_mask_is_the_documented_one,
        ),
        ("jitter_is_uniform", jitter_is_uniform),
        (
            "the_gradient_has_the_same_mask",
            the_gradient_has_the_same_mask,
        ),
        ("steps_differ_and_repeat", steps_differ_and_repeat),
    ];
    for (name, fact) in facts {
        trials.extend(devices::trials(&format!("noise::{name}"), fact));
    }
    for (name, forward) in LAYERS {
        trials.extend(devices::trials(
            &format!("noise::only_the_adapter_in_training_{name}"),
            move |device| only_the_adapter_in_training(device, forward),
        ));
        trials.extend(devices::trials(
            &format!("noise::training_repeats_{name}"),
            move |device| training_repeats(device, forward),
        ));
    }
    trials
}
