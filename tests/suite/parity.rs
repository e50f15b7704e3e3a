//! Every device against the f64 reference, on every case: results and gradients, checked and trusted.

use std::sync::Arc;

use libtest_mimic::{Failed, Trial};
use rankmix::{DType, Device};

use crate::case::Case;
use crate::metrics::relative_errors;
use crate::{cases, devices};

fn check(case: &Case, device: &Device) -> Result<(), Failed> {
    let want = case.compile(&Device::reference())?.run()?;
    let mut harness = case.compile(device)?;
    let got = harness.run()?;
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
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

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for case in cases::all().into_iter().map(Arc::new) {
        trials.extend(devices::trials(&format!("parity::{}", case.name), {
            let case = Arc::clone(&case);
            move |device| check(&case, device)
        }));
    }
    trials
}
