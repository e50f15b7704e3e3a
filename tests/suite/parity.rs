//! Every device against the f64 reference, on every case: results and gradients, checked and trusted; and every kernel that an operation could
//! take in place of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use libtest_mimic::{Failed, Trial};
use rankmix::{DType, Device, Precision, Tensor};

use crate::case::Case;
use crate::kernels::each_choice;
use crate::metrics::relative_errors;
use crate::{cases, devices};

fn check(case: &Case, device: &Device) -> Result<(), Failed> {
    agrees(case, device, &case.compile(&Device::reference())?.run()?)
}

fn agrees(case: &Case, device: &Device, want: &[Tensor]) -> Result<(), Failed> {
    let mut harness = case.compile(device)?;
    let got = harness.run()?;
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        if want.dtype() == DType::I32 {
            if got != want {
                return Err(format!("result {index}: the integers differ").into());
            }
            continue;
        }
        let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
        if norm > 1e-5 || largest > 1e-4 {
            return Err(format!(
                "result {index}: relative error {norm:.2e} in norm, {largest:.2e} of the largest"
            )
            .into());
        }
    }
    let again = harness.run()?;
    if got != again {
        return Err("a second run is not equal bit for bit".into());
    }
    Ok(())
}

/// The cases of matrix products with each of their kernels in turn, on a device of its own; and that these kernels are launched.
fn every_choice(device: &Device) -> Result<(), Failed> {
    // GL on a software rasteriser has the same compiler as its Vulkan.
    let adapter = device.adapter().filter(|adapter| adapter.backend != "gl");
    let Some(adapter) = adapter else {
        return Ok(());
    };
    let mut launched = BTreeSet::new();
    let cases = cases::all().into_iter();
    for case in cases.filter(|case| case.name.contains("matmul")) {
        let graph = case.graph(Precision::F32)?;
        let want = case.compile(&Device::reference())?.run()?;
        for (kernel, chosen) in each_choice(&graph, &adapter.capabilities) {
            let launches = graph.launches(&chosen, false)?;
            let named = launches.iter().map(|launch| launch.shader.name);
            launched.extend(named.map(|shader| (kernel, shader)));
            device.choose_kernels(chosen.kernels);
            agrees(&case, device, &want)
                .map_err(|error| format!("{} by `{kernel}`: {error:?}", case.name))?;
        }
    }
    for pair in [
        ("staged 64", "matmul_staged"),
        ("staged 32", "matmul_staged"),
        ("direct 4", "matmul"),
        ("split", "matmul_split"),
        ("split in parts", "matmul_split"),
    ] {
        if !launched.contains(&pair) {
            return Err(format!("`{}` never launched {}", pair.0, pair.1).into());
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
