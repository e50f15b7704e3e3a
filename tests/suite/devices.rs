//! The devices that tests run on: the CPU executor, and whatever Vulkan, Metal, DX12 and GL adapters there are, each
//! checked and trusted. A device that is not there is a test that is ignored, by name and with the reason.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use libtest_mimic::{Completion, Failed, Trial};
use rankmix::{Device, DeviceOptions, Error};

/// Backends a test is made for; `gl` only where it is the software one or asked for.
const BACKENDS: [&str; 3] = ["cpu", NATIVE, "gl"];

#[cfg(target_os = "macos")]
const NATIVE: &str = "metal";
#[cfg(target_os = "windows")]
const NATIVE: &str = "dx12";
#[cfg(not(any(target_os = "macos", target_os = "windows")))]
const NATIVE: &str = "vulkan";

/// A device, or why there is none.
type Opened = Result<Device, String>;

/// The device of a backend, opened once.
fn device(backend: &'static str, checked: bool) -> Opened {
    static OPEN: OnceLock<Mutex<HashMap<(&str, bool), Opened>>> = OnceLock::new();
    let mut open = OPEN
        .get_or_init(Mutex::default)
        .lock()
        .expect("no test panics while it opens a device");
    open.entry((backend, checked))
        .or_insert_with(|| open_device(backend, checked).map_err(|error| error.to_string()))
        .clone()
}

fn open_device(backend: &str, checked: bool) -> Result<Device, Error> {
    Device::open_with(&DeviceOptions {
        request: Some(backend.to_owned()),
        checked,
        ..DeviceOptions::default()
    })
}

/// A line for every device, so that a run's output says what it ran on.
pub fn describe() -> String {
    let mut lines = String::new();
    for backend in BACKENDS {
        let line = match device(backend, false) {
            Err(reason) => format!("none: {reason}"),
            Ok(device) => device.adapter().map_or_else(
                || device.name(),
                |adapter| {
                    let subgroups = match adapter.subgroup_sizes {
                        Some([smallest, largest]) if smallest == largest => {
                            format!("subgroups of {smallest}")
                        }
                        Some([smallest, largest]) => {
                            format!("subgroups of {smallest} to {largest}")
                        }
                        None => "no subgroups".to_owned(),
                    };
                    let f16 = if adapter.capabilities.f16 {
                        "f16"
                    } else {
                        "no f16"
                    };
                    format!("{}; {}; {subgroups}; {f16}", adapter.name, adapter.driver)
                },
            ),
        };
        lines.push_str(&format!("device {backend}: {line}\n"));
    }
    lines
}

/// A test that runs on a device, or is ignored because the device is not there.
fn trial(
    name: String,
    backend: &'static str,
    checked: bool,
    check: impl FnOnce(Device) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match device(backend, checked) {
        Ok(device) => check(device).map(|()| Completion::Completed),
        Err(reason) => Ok(Completion::ignored_with(reason)),
    })
}

/// A test for every trusted device, each on a device of its own: for tests that read the device's counters.
pub fn own_trials(
    name: &str,
    check: impl Fn(&Device) -> Result<(), Failed> + Clone + Send + 'static,
) -> Vec<Trial> {
    let own = |backend: &'static str| {
        let check = check.clone();
        trial(format!("{name}::{backend}"), backend, false, move |_| {
            check(&open_device(backend, false)?)
        })
    };
    BACKENDS.into_iter().map(own).collect()
}

/// A test for every device, checked and trusted.
pub fn trials(
    name: &str,
    check: impl Fn(&Device) -> Result<(), Failed> + Clone + Send + 'static,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        for (checked, mode) in [(false, "trusted"), (true, "checked")] {
            let check = check.clone();
            let name = format!("{name}::{backend}_{mode}");
            trials.push(trial(name, backend, checked, move |device| check(&device)));
        }
    }
    trials
}

/// A test for every GPU backend that opens its device itself.
pub fn backend_trials(name: &str, check: fn(&str) -> Result<(), Failed>) -> Vec<Trial> {
    BACKENDS
        .into_iter()
        .filter(|&backend| backend != "cpu")
        .map(|backend| {
            trial(format!("{name}::{backend}"), backend, false, move |_| {
                check(backend)
            })
        })
        .collect()
}
