//! Errors as JavaScript has them: an `Error` whose `message` is for a person and whose `name` is for a program.

use rankmix::Error;
use wasm_bindgen::JsValue;

/// What a promise of this package is rejected with.
#[derive(Debug)]
pub struct Failure {
    name: &'static str,
    message: String,
}

impl Failure {
    pub fn new(name: &'static str, message: impl Into<String>) -> Self {
        Self {
            name,
            message: message.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let name = match error {
            Error::Shape { .. } => "Shape",
            Error::Setting { .. } => "Setting",
            Error::Limit { .. } => "Limit",
            Error::OutOfMemory { .. } => "OutOfMemory",
            Error::DeviceLost { .. } => "DeviceLost",
            Error::NoAdapter { .. } => "NoAdapter",
            Error::UnknownDevice { .. } => "UnknownDevice",
            Error::Gpu { .. } => "Gpu",
            Error::Format { .. } => "Format",
            Error::NotFinite { .. } => "NotFinite",
            Error::WouldBlock { .. } => "WouldBlock",
            _ => "Rankmix",
        };
        Self::new(name, error.to_string())
    }
}

impl From<serde_wasm_bindgen::Error> for Failure {
    fn from(error: serde_wasm_bindgen::Error) -> Self {
        Self::new("Setting", format!("settings: {error}"))
    }
}

impl From<Failure> for JsValue {
    fn from(failure: Failure) -> Self {
        let error = js_sys::Error::new(&failure.message);
        error.set_name(failure.name);
        error.into()
    }
}
