//! The devices that tests run on: the CPU executor, and whatever Vulkan, Metal, DX12 and GL adapters there are, each
//! checked and trusted. A device that is not there is a test that is ignored, by name.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use libtest_mimic::{Failed, Trial};
use rankmix::{Device, DeviceOptions};

/// Backends a test is made for; `gl` only where it is the software one or asked for.
const BACKENDS: [&str; 3] = ["cpu", NATIVE, "gl"];

#[cfg(target_os = "macos")]
const NATIVE: &str = "metal";
#[cfg(target_os = "windows")]
const NATIVE: &str = "dx12";
#[cfg(not(any(target_os = "macos", target_os = "windows")))]
const NATIVE: &str = "vulkan";

/// Devices by backend and mode; `None` for one that is not there.
type Opened = Mutex<HashMap<(String, bool), Option<Device>>>;

/// The device of a backend, opened once; `None` where there is no adapter.
fn device(backend: &str, checked: bool) -> Option<Device> {
    static OPEN: OnceLock<Opened> = OnceLock::new();
    let mut open = OPEN
        .get_or_init(Mutex::default)
        .lock()
        .expect("no test panics while it opens a device");
    open.entry((backend.to_owned(), checked))
        .or_insert_with(|| open_device(backend, checked))
        .clone()
}

fn open_device(backend: &str, checked: bool) -> Option<Device> {
    Device::open_with(&DeviceOptions {
        request: Some(backend.to_owned()),
        checked,
    })
    .ok()
}

/// A test for every trusted device, each on a device of its own: for tests that read the device's counters.
pub fn own_trials(
    name: &str,
    check: impl Fn(&Device) -> Result<(), Failed> + Clone + Send + 'static,
) -> Vec<Trial> {
    let trial = |backend: &'static str| {
        let (name, check) = (format!("{name}::{backend}"), check.clone());
        match device(backend, false) {
            Some(_) => Trial::test(name, move || {
                check(&open_device(backend, false).ok_or("the device is gone")?)
            }),
            None => Trial::test(name, || Ok(())).with_ignored_flag(true),
        }
    };
    BACKENDS.into_iter().map(trial).collect()
}

/// A test for every device, checked and trusted: ignored where the device is not there.
pub fn trials(
    name: &str,
    check: impl Fn(&Device) -> Result<(), Failed> + Clone + Send + 'static,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        for checked in [false, true] {
            let mode = if checked { "checked" } else { "trusted" };
            let name = format!("{name}::{backend}_{mode}");
            trials.push(match device(backend, checked) {
                Some(device) => {
                    let check = check.clone();
                    Trial::test(name, move || check(&device))
                }
                None => Trial::test(name, || Ok(())).with_ignored_flag(true),
            });
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
            let missing = device(backend, false).is_none();
            Trial::test(format!("{name}::{backend}"), move || check(backend))
                .with_ignored_flag(missing)
        })
        .collect()
}
