//! The open device, and what can be done on it.

use std::path::Path;
use std::rc::Rc;

use js_sys::{Promise, Reflect};
use rankmix::golden::GoldenCase;
use rankmix::train::Schedule;
use rankmix::{Device, DeviceOptions, ParameterStore, Precision};
use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;
use wasm_bindgen_futures::future_to_promise;

use crate::failure::Failure;
use crate::model::Adapter;
use crate::settings::Settings;
use crate::text::Language;
use crate::texts;
use crate::trainer::{Curriculum, Trainer, object};
use crate::training::TOKENS;

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** What replaying a golden case found. */
export interface Replay {
    name: string;
    ok: boolean;
    /** ‖got - want‖ / ‖want‖ of the output. */
    output_error: number;
    /** The largest such error of the gradients, and the gradient that has it. */
    gradient_error: number;
    worst_gradient: string;
    experts_equal: boolean;
}
"#;

const WEBGPU: &str = "webgpu";
const NO_WEBGPU: &str = "this browser has no WebGPU. Recent versions of Chrome, Edge, Safari and Firefox have it, on pages that come over https or from localhost";

/// Whether there is a `navigator.gpu`.
fn has_webgpu() -> bool {
    let field = |object: &JsValue, name: &str| Reflect::get(object, &JsValue::from(name)).ok();
    field(&js_sys::global(), "navigator")
        .and_then(|navigator| field(&navigator, "gpu"))
        .is_some_and(|gpu| gpu.is_truthy())
}

/// Steps in which the base's learning rate rises to its full height, where it stays.
const WARMUP: u64 = 5;

/// An open device.
#[wasm_bindgen]
pub struct Lab {
    device: Device,
    languages: Rc<Vec<Language>>,
}

impl Lab {
    async fn open_device(request: Option<String>) -> Result<Self, Failure> {
        let request = request.unwrap_or_else(|| WEBGPU.to_owned());
        if request == WEBGPU && !has_webgpu() {
            return Err(Failure::new("NoWebGpu", NO_WEBGPU));
        }
        let options = DeviceOptions {
            request: Some(request),
            ..DeviceOptions::default()
        };
        Ok(Self {
            device: Device::open_async(&options).await?,
            languages: Rc::new(texts::languages()?),
        })
    }

    fn base_index(&self) -> Result<usize, Failure> {
        let mut languages = self.languages.iter();
        languages
            .position(|language| language.name == texts::BASE)
            .ok_or_else(|| Failure::new("Rankmix", "the base's language is missing"))
    }
}

#[wasm_bindgen]
impl Lab {
    /// Opens the browser's GPU. `request` picks another device: "cpu" for the processor, which every browser has.
    ///
    /// # Errors
    /// An `Error` for a person to read if there is no WebGPU or no adapter.
    pub async fn open(request: Option<String>) -> Result<Self, JsValue> {
        Ok(Self::open_device(request).await?)
    }

    /// The adapter.
    #[must_use]
    pub fn adapter_name(&self) -> String {
        self.device.name()
    }

    /// The languages' names, in the order used everywhere.
    #[must_use]
    pub fn languages(&self) -> Vec<String> {
        let names = self.languages.iter().map(|language| language.name.clone());
        names.collect()
    }

    /// The language that the base is trained on.
    #[must_use]
    pub fn base_language(&self) -> String {
        texts::BASE.to_owned()
    }

    /// Bytes of text in a step.
    #[must_use]
    pub fn tokens_per_step(&self) -> usize {
        TOKENS
    }

    /// A trainer of the base itself, on its one language, for any number of steps.
    #[wasm_bindgen(unchecked_return_type = "Promise<Trainer>")]
    pub fn base(&self, seed: u32) -> Promise {
        let store = ParameterStore::new(&self.device);
        let schedule = Schedule::Constant { warmup: WARMUP };
        let languages = Rc::clone(&self.languages);
        let only = self.base_index();
        future_to_promise(async move {
            let curriculum = Curriculum {
                languages,
                only: Some(only?),
            };
            let seed = u64::from(seed);
            let trainer =
                Trainer::new(Adapter::None, store, None, curriculum, schedule, seed).await?;
            Ok(trainer.into())
        })
    }

    /// A trainer of an adapter on the frozen base, on all languages. The base stays usable; its weights are on the device once.
    #[wasm_bindgen(unchecked_return_type = "Promise<Trainer>")]
    pub fn adapter(
        &self,
        base: &Trainer,
        #[wasm_bindgen(unchecked_param_type = "Settings")] settings: JsValue,
    ) -> Promise {
        let store = ParameterStore::new(&self.device);
        let weights = base.weights();
        let curriculum = Curriculum {
            languages: Rc::clone(&self.languages),
            only: None,
        };
        future_to_promise(async move {
            let settings = Settings::from_page(settings)?;
            let schedule = Schedule::Cosine {
                warmup: settings.steps / 20,
                steps: settings.steps,
            };
            let (adapter, seed) = (settings.adapter(), settings.seed);
            let trainer =
                Trainer::new(adapter, store, Some(weights), curriculum, schedule, seed).await?;
            Ok(trainer.into())
        })
    }

    /// Replays a golden case, the bytes of a `.safetensors` file; `storage` is "f32" or "f16".
    #[wasm_bindgen(unchecked_return_type = "Promise<Replay>")]
    pub fn replay(&self, name: String, bytes: Vec<u8>, storage: String) -> Promise {
        let device = self.device.clone();
        future_to_promise(async move { Ok(replayed(&device, &name, &bytes, &storage).await?) })
    }
}

async fn replayed(
    device: &Device,
    name: &str,
    bytes: &[u8],
    storage: &str,
) -> Result<JsValue, Failure> {
    let precision = match storage {
        "f32" => Precision::F32,
        "f16" => Precision::F16,
        _ => {
            let message = format!("storage = {storage}: there are f32 and f16");
            return Err(Failure::new("Setting", message));
        }
    };
    let case = GoldenCase::parse(bytes, Path::new(name))?;
    let replay = case.replay_async(device, precision).await?;
    let found = object(&[
        ("name", JsValue::from(case.name)),
        ("ok", JsValue::from(replay.ok)),
        ("output_error", JsValue::from(replay.output_error)),
        ("gradient_error", JsValue::from(replay.gradient_error)),
        ("worst_gradient", JsValue::from(replay.worst_gradient)),
        ("experts_equal", JsValue::from(replay.experts_equal)),
    ])?;
    Ok(found.into())
}
