//! What a page asks for.

use rankmix::layers::{GateInput, Routing};
use rankmix::ops::Rotation;
use serde::Deserialize;
use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;

use crate::failure::Failure;
use crate::model::Adapter;

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** An adapter to train. */
export interface Settings {
    kind: "lora" | "moe_lora" | "rotmole" | "comol";
    rank: number;
    /** Not used by `lora`. */
    experts: number;
    /** Experts a token takes; used by `moe_lora` and `rotmole`. */
    top_k: number;
    /** Used by `rotmole`: "planes", "givens", "cayley", "butterfly", "brick_wall:N" (N layers) or "householder". */
    rotation: string;
    /** The learning rate warms up, then falls to 0 over so many steps. */
    steps: number;
    /** Decides the parameters' first values and the text that each step sees. */
    seed: number;
}
"#;

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Lora,
    MoeLora,
    Rotmole,
    Comol,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Settings {
    kind: Kind,
    rank: usize,
    experts: usize,
    top_k: usize,
    rotation: Rotation,
    pub steps: u64,
    pub seed: u64,
}

impl Settings {
    pub fn from_page(value: JsValue) -> Result<Self, Failure> {
        Ok(serde_wasm_bindgen::from_value(value)?)
    }

    pub fn adapter(&self) -> Adapter {
        let &Self { rank, experts, .. } = self;
        let router = Routing::new(experts, self.top_k);
        match self.kind {
            Kind::Lora => Adapter::Lora { rank },
            Kind::MoeLora => Adapter::MoeLora { rank, router },
            Kind::Rotmole => Adapter::RotMole {
                rank,
                router,
                rotation: self.rotation,
                gate_input: GateInput::Input,
            },
            Kind::Comol => Adapter::CoMol { rank, experts },
        }
    }
}
