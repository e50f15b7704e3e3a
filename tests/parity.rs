//! Every device against the f64 reference, on every case: results and gradients, checked and trusted.

mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use rankmix::{DType, Device};
use support::case::Case;
use support::{cases, devices, relative_errors};

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
            return Err(format!("result {index}: relative error {norm:.2e} in norm, {largest:.2e} of the largest").into());
        }
    }
    let again = harness.run()?;
    if got != again {
        return Err("a second run is not equal bit for bit".into());
    }
    Ok(())
}

fn main() {
    let mut trials = Vec::new();
    for (label, device) in devices::all() {
        for case in cases::all() {
            let name = format!("{label}::{}", case.name);
            trials.push(match device.clone() {
                Some(device) => Trial::test(name, move || check(&case, &device)),
                None => Trial::test(name, || Ok(())).with_ignored_flag(true),
            });
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
