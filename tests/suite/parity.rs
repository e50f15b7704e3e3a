//! Every device against the f64 reference, on every case: results and gradients, checked and trusted; and every kernel that an operation could
//! take in place of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use libtest_mimic::{Failed, Trial};
use rankmix::golden::HALF_TOLERANCES;
use rankmix::{DType, Device, Precision, Tensor};

use crate::case::Case;
use crate::kernels::each_choice;
use crate::metrics::relative_errors;
use crate::{cases, devices};

fn check(case: &Case, device: &Device) -> Result<(), Failed> {
    let want = case.compile(&Device::reference())?.run()?;
    agrees(case, device, Precision::F32, &want)?;
    Ok(())
}

/// The results of the case on the device, which are what they should be, twice bit for bit.
pub fn agrees(
    case: &Case,
    device: &Device,
    precision: Precision,
    want: &[Tensor],
) -> Result<Vec<Tensor>, Failed> {
    let tolerances = if precision == Precision::F32 {
        (1e-5, 1e-4)
    } else {
        HALF_TOLERANCES
    };
    let mut harness = case.compile_stored(device, precision)?;
    let got = harness.run()?;
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        if want.dtype() == DType::I32 {
            if got != want {
                return Err(format!("result {index}: the integers differ").into());
            }
            continue;
        }
        let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
        if norm > tolerances.0 || largest > tolerances.1 {
            return Err(format!(
                "result {index}: relative error {norm:.2e} in norm, {largest:.2e} of the largest"
            )
            .into());
        }
    }
    if harness.run()? != got {
        return Err("a second run is not equal bit for bit".into());
    }
    Ok(got)
}

/// The cases of products and grouped shrinks with each of their kernels in turn, on a device of its own; and that these kernels are launched.
fn every_choice(device: &Device) -> Result<(), Failed> {
    // GL on a software rasteriser has the same compiler as its Vulkan.
    let adapter = device.adapter().filter(|adapter| adapter.backend != "gl");
    let Some(adapter) = adapter else {
        return Ok(());
    };
    let (mut launched, mut compiled) = (BTreeSet::new(), BTreeSet::new());
    let cases = cases::all().into_iter();
    let has_choice = |case: &Case| {
        ["matmul", "shrink"]
            .iter()
            .any(|name| case.name.contains(name))
    };
    for case in cases.filter(has_choice) {
        let want = case.compile(&Device::reference())?.run()?;
        for (precision, of_precision) in [(Precision::F32, "f32"), (Precision::F16, "f16")] {
            let graph = case.graph(precision)?;
            for (kernel, chosen) in each_choice(&graph, &adapter.capabilities) {
                let launches = graph.launches(&chosen, false)?;
                let named = launches.iter().map(|launch| launch.shader.name);
                launched.extend(named.map(|shader| (of_precision, kernel, shader)));
                let pipelines = launches.iter().map(|launch| {
                    (
                        launch.shader.name,
                        launch.entry,
                        format!("{:?}", launch.constants),
                    )
                });
                let before = compiled.len();
                compiled.extend(pipelines);
                let is_new = compiled.len() > before;
                // In 16 bits loads and stores alone differ: each pipeline once. A driver takes a second for some.
                // For half the result as its gradient the angles of a rotation have none, but for what is rounded.
                let has_digits = case.name != "tiles_of_rotated_shrink";
                if precision == Precision::F16 && !(is_new && has_digits) {
                    continue;
                }
                device.choose_kernels(chosen.kernels);
                agrees(&case, device, precision, &want).map_err(|error| {
                    format!("{} in {of_precision} by `{kernel}`: {error:?}", case.name)
                })?;
            }
        }
    }
    for precision in ["f32", "f16"] {
        for (kernel, shader) in [
            ("staged 64", "matmul_staged"),
            ("staged 32", "matmul_staged"),
            ("direct 4", "matmul"),
            ("split", "matmul_split"),
            ("split in parts", "matmul_split"),
            ("direct", "shrink"),
            ("split", "shrink"),
            ("direct", "rotated_shrink"),
            ("split", "rotated_shrink"),
        ] {
            let is_of = |name: &str| {
                let mut words = name.split(' ');
                words.next() == Some(shader) && words.next().is_some() == (precision == "f16")
            };
            let found = launched
                .iter()
                .any(|&(of, by, name)| (of, by) == (precision, kernel) && is_of(name));
            if !found {
                return Err(format!("`{kernel}` never launched {shader} in {precision}").into());
            }
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = devices::own_trials("parity::every_choice", every_choice);
    for case in cases::all().into_iter().map(Arc::new) {
        trials.extend(devices::trials(&format!("parity::{}", case.name), {
            let case = Arc::clone(&case);
            move |device| check(&case, device)
        }));
    }
    trials
}
