//! Choosing kernels by measuring them. Not on software GL, whose compiler takes long for the kernels that GPUs take.

use std::collections::BTreeSet;

use libtest_mimic::{Failed, Trial};
use rankmix::device::KernelChoices;
use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType, Value};

use crate::devices::own_trials;

fn product() -> rankmix::Result<(Graph, Value)> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([24, 128]))?;
    let w = graph.input("w", TensorType::f32([40, 128]))?;
    let y = graph.matmul_nt(x, w)?;
    graph.output(y)?;
    Ok((graph, y))
}

fn ramp(dims: [usize; 2]) -> rankmix::Result<Tensor> {
    let data = (0..dims[0] * dims[1]).map(|i| (i as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(dims, data.collect())
}

/// What the product is on the device, and the kernels that made it.
fn run(device: &Device) -> Result<(Vec<f32>, String), Failed> {
    let (graph, y) = product()?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.set("x", &ramp([24, 128])?)?;
    session.set("w", &ramp([40, 128])?)?;
    let result = session.run_reading(&[y])?[0].to_f32();
    let launches = session.launches().into_iter();
    let kernels = launches.map(|launch| {
        let name = launch.shader.name;
        format!("{name} {} {:?}", launch.entry, launch.constants)
    });
    Ok((result, kernels.collect::<Vec<_>>().join("; ")))
}

fn what_is_chosen_runs(device: &Device) -> Result<(), Failed> {
    let (graph, _) = product()?;
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
        names.len() > 2 && names.contains(&operation.chosen),
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

    let (expected, own) = run(&Device::cpu())?;
    assert!(own.is_empty(), "the CPU executor launched {own}");
    let mut seen = BTreeSet::new();
    for name in names {
        let mut choices = KernelChoices::default();
        choices.insert(operation.key.as_str(), name);
        device.choose_kernels(choices);
        let (result, kernels) = run(device)?;
        for (x, y) in result.iter().zip(&expected) {
            assert!((x - y).abs() < 1e-5, "{name} gives {x}, the CPU {y}");
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
    let (_, unknown) = run(device)?;
    device.choose_kernels(KernelChoices::default());
    assert_eq!(unknown, run(device)?.1);
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = own_trials("tuning::what_is_chosen_runs", what_is_chosen_runs);
    trials.retain(|trial| !trial.name().ends_with("::gl"));
    trials
}
