//! rankmix in a web page: the language model of the finetune example, trained and adapted in the visitor's browser, and golden cases
//! replayed there. Everything that touches the device is a promise: a page must never wait.

mod angles;
mod failure;
mod lab;
mod late;
mod refusals;
mod settings;
mod texts;
mod trainer;

#[path = "../../finetune/model.rs"]
mod model;
#[path = "../../finetune/text.rs"]
mod text;
#[path = "../../finetune/training.rs"]
mod training;

use std::panic;

use wasm_bindgen::prelude::wasm_bindgen;

pub use lab::Lab;
pub use late::{initialized_again, stepped_again};
pub use refusals::refusals;
pub use trainer::Trainer;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = console)]
    fn error(text: &str);
}

/// A panic would be a bug. It then says where on the console, where a browser alone says `unreachable`.
#[wasm_bindgen(start)]
fn start() {
    panic::set_hook(Box::new(|info| error(&info.to_string())));
}
