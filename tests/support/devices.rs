//! The devices that tests run on: the CPU executor, and whatever Vulkan, Metal, DX12 and GL adapters there are, each
//! checked and trusted. A device that is not there is a test that is ignored, by name.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use rankmix::{Device, DeviceOptions};

/// Backends a test is made for; `gl` only where it is the software one or asked for.
pub const BACKENDS: [&str; 3] = ["cpu", NATIVE, "gl"];

#[cfg(target_os = "macos")]
const NATIVE: &str = "metal";
#[cfg(target_os = "windows")]
const NATIVE: &str = "dx12";
#[cfg(not(any(target_os = "macos", target_os = "windows")))]
const NATIVE: &str = "vulkan";

/// The device of a backend, opened once; `None` where there is no adapter.
pub fn device(backend: &str, checked: bool) -> Option<Device> {
    static OPEN: OnceLock<Mutex<HashMap<(String, bool), Option<Device>>>> = OnceLock::new();
    let mut open = OPEN.get_or_init(Mutex::default).lock().expect("no test panics while it opens a device");
    open.entry((backend.to_owned(), checked))
        .or_insert_with(|| {
            let options = DeviceOptions { request: Some(backend.to_owned()), checked };
            Device::open_with(&options).ok()
        })
        .clone()
}

/// Every (label, device) pair; `None` for a device that is not there.
pub fn all() -> Vec<(String, Option<Device>)> {
    BACKENDS
        .iter()
        .flat_map(|&backend| {
            [false, true].map(|checked| {
                let mode = if checked { "checked" } else { "trusted" };
                (format!("{backend}_{mode}"), device(backend, checked))
            })
        })
        .collect()
}
