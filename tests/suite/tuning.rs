//! Choosing kernels by measuring them. Not on software GL, whose compiler takes long for the kernels that GPUs take.

use std::collections::BTreeSet;

use libtest_mimic::{Failed, Trial};
use rankmix::device::KernelChoices;
use rankmix::ops::{Layout, Segments};
use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType, Value};

use crate::devices::own_trials;

/// A graph, the names and shapes of its inputs, and its result.
struct Made {
    graph: Graph,
    inputs: Vec<(&'static str, Vec<usize>)>,
    result: Value,
}

type Make = fn() -> rankmix::Result<Made>;

fn made(
    inputs: Vec<(&'static str, Vec<usize>)>,
    build: impl Fn(&mut Graph, &[Value]) -> rankmix::Result<Value>,
) -> rankmix::Result<Made> {
    let mut graph = Graph::new();
    let declared = inputs.iter();
    let values: Vec<Value> = declared
        .map(|(name, dims)| graph.input(name, TensorType::f32(dims.as_slice())))
        .collect::<rankmix::Result<_>>()?;
    let result = build(&mut graph, &values)?;
    graph.output(result)?;
    Ok(Made {
        graph,
        inputs,
        result,
    })
}

fn product() -> rankmix::Result<Made> {
    let inputs = vec![("x", vec![24, 128]), ("w", vec![40, 128])];
    made(inputs, |graph, v| graph.matmul_nt(v[0], v[1]))
}

const EXPERTS: usize = 3;

/// Two experts a row; every fourth pair has none.
fn segments(graph: &mut Graph) -> rankmix::Result<Segments> {
    let experts = (0..48).map(|pair| pair % (EXPERTS as i32 + 1)).collect();
    let experts = graph.constant(Tensor::i32([24, 2], experts)?)?;
    graph.segments_with_none(experts, EXPERTS)
}

fn shrink() -> rankmix::Result<Made> {
    let inputs = vec![("x", vec![24, 128]), ("w", vec![EXPERTS, 8, 128])];
    made(inputs, |graph, v| {
        let segments = segments(graph)?;
        graph.shrink(v[0], v[1], Layout::OutIn, segments)
    })
}

fn rotated_shrink() -> rankmix::Result<Made> {
    let inputs = vec![
        ("x", vec![24, 128]),
        ("a", vec![EXPERTS, 8, 128]),
        ("v", vec![EXPERTS, 4, 128]),
    ];
    made(inputs, |graph, v| {
        let segments = segments(graph)?;
        Ok(graph.rotated_shrink(v[0], v[1], v[2], segments)?[0])
    })
}

fn ramp(dims: &[usize]) -> rankmix::Result<Tensor> {
    let data = (0..dims.iter().product()).map(|i: usize| (i as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(dims, data.collect())
}

/// What the result is on the device, and the kernels that made it.
fn run(make: Make, device: &Device) -> Result<(Vec<f32>, String), Failed> {
    let Made {
        graph,
        inputs,
        result,
    } = make()?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    for (name, dims) in inputs {
        session.set(name, &ramp(&dims)?)?;
    }
    let result = session.run_reading(&[result])?[0].to_f32();
    let launches = session.launches().into_iter();
    let kernels = launches.map(|launch| {
        let name = launch.shader.name;
        format!("{name} {} {:?}", launch.entry, launch.constants)
    });
    Ok((result, kernels.collect::<Vec<_>>().join("; ")))
}

fn what_is_chosen_runs(device: &Device) -> Result<(), Failed> {
    for make in [product, shrink, rotated_shrink] {
        chosen_runs(make, device)?;
    }
    Ok(())
}

fn chosen_runs(make: Make, device: &Device) -> Result<(), Failed> {
    let Made { graph, .. } = make()?;
    let tuning = device.tune(&graph)?;
    let Some(adapter) = device.adapter() else {
        assert!(
            tuning.operations.is_empty(),
            "the CPU executor has no choice"
        );
        return Ok(());
    };
    let choices = graph.kernel_choices(&adapter.capabilities)?;
    assert_eq!((tuning.operations.len(), choices.len()), (1, 1));
    let operation = &tuning.operations[0];
    assert_eq!(operation.key, choices[0].key);
    let names: Vec<_> = operation.kernels.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, choices[0].kernels);
    assert!(
        names.len() >= 2 && names.contains(&operation.chosen),
        "{operation:?}"
    );
    for (kernel, seconds) in &operation.kernels {
        assert!(
            seconds.is_some_and(|seconds| seconds > 0.0),
            "{kernel}: {seconds:?}"
        );
    }
    assert_eq!(tuning.choices().get(&operation.key), Some(operation.chosen));
    assert!(device.kernels().is_empty(), "measuring changed the device");

    let (expected, own) = run(make, &Device::cpu())?;
    assert!(own.is_empty(), "the CPU executor launched {own}");
    let mut seen = BTreeSet::new();
    for name in names {
        let mut choices = KernelChoices::default();
        choices.insert(operation.key.as_str(), name);
        device.choose_kernels(choices);
        let (result, kernels) = run(make, device)?;
        for (x, y) in result.iter().zip(&expected) {
            // Angles of many radians keep fewer digits.
            assert!((x - y).abs() < 1e-4, "{name} gives {x}, the CPU {y}");
        }
        assert!(
            seen.insert(kernels.clone()),
            "{name} is the same as another: {kernels}"
        );
    }
    // What nobody knows is left to the operation's own rule.
    let mut choices = KernelChoices::default();
    choices.insert(operation.key.as_str(), "no such kernel");
    device.choose_kernels(choices);
    let (_, unknown) = run(make, device)?;
    device.choose_kernels(KernelChoices::default());
    assert_eq!(unknown, run(make, device)?.1);
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = own_trials("tuning::what_is_chosen_runs", what_is_chosen_runs);
    trials.retain(|trial| !trial.name().ends_with("::gl"));
    trials
}
