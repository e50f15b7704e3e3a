//! A training under way, a step at a time.

use std::cell::RefCell;
use std::rc::Rc;

use js_sys::{Float64Array, Object, Promise, Reflect};
use rankmix::graph::SessionOptions;
use rankmix::train::Schedule;
use rankmix::{ParameterStore, Session};
use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;
use wasm_bindgen_futures::future_to_promise;

use crate::angles::{Angles, Look, Spot};
use crate::failure::Failure;
use crate::model::Adapter;
use crate::text::Language;
use crate::training::{HeldOutGraph, Judgement, StepGraph, TOKENS, Training, bits};

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** How well a model does on the held-out text, and what its experts do. */
export interface Inspection {
    /** Held-out bits per byte by language. */
    bits: Float64Array;
    /** Layers with experts; 0 for a base and for LoRA, as are the experts. */
    layers: number;
    experts: number;
    /** [layer][expert][language]: the expert's share of the language's gates; sums to 1 over the experts. */
    shares: Float64Array;
    /** RotMoLE only, else empty: `angle_count` radians for each sampled token and each of its experts, about half a million at most. */
    angles: Float32Array;
    /** How many angles an entry has. */
    angle_count: number;
    /** The expert, the language and the layer of each entry. */
    angle_expert: Uint8Array;
    angle_language: Uint8Array;
    angle_layer: Uint8Array;
    /** "plane": the gate's own angles of planes. "turn": the angle between the latent before and after the rotation. */
    angle_kind: "plane" | "turn";
}
"#;

/// The languages that a trainer sees: all are inspected, some trained on.
#[derive(Clone)]
pub struct Curriculum {
    pub languages: Rc<Vec<Language>>,
    /// The one to train on; `None`: all.
    pub only: Option<usize>,
}

/// The work behind a [`Trainer`].
struct Work {
    adapter: Adapter,
    store: ParameterStore,
    curriculum: Curriculum,
    training: Training,
    /// Compiled when first asked for.
    inspector: Option<Inspector>,
}

struct Inspector {
    held_out: HeldOutGraph,
    session: Session,
    looks: Vec<Look>,
}

impl Inspector {
    async fn new(adapter: &Adapter, store: &ParameterStore) -> rankmix::Result<Self> {
        let mut held_out = HeldOutGraph::new(adapter)?;
        let rotated = held_out
            .model
            .routed
            .iter()
            .filter_map(|layer| layer.rotated);
        let looks: Vec<Look> = rotated.map(|latents| Look::new(adapter, latents)).collect();
        for value in looks.iter().flat_map(Look::outputs) {
            held_out.graph.output(value)?;
        }
        let options = SessionOptions::default();
        let session = held_out.graph.compile_async(store, options).await?;
        Ok(Self {
            held_out,
            session,
            looks,
        })
    }
}

impl Work {
    async fn step(&mut self) -> Result<JsValue, Failure> {
        let languages = &self.curriculum.languages;
        let train_on: Vec<&Language> = match self.curriculum.only {
            Some(language) => vec![&languages[language]],
            None => languages.iter().collect(),
        };
        self.training.prepare_step(&train_on)?;
        let read = [self.training.loss];
        let loss = self.training.session.run_reading_async(&read).await?;
        Ok(JsValue::from(bits(&loss[0])))
    }

    async fn inspect(&mut self) -> Result<JsValue, Failure> {
        if self.inspector.is_none() {
            self.inspector = Some(Inspector::new(&self.adapter, &self.store).await?);
        }
        let Some(Inspector {
            held_out,
            session,
            looks,
        }) = &mut self.inspector
        else {
            return Ok(JsValue::UNDEFINED);
        };
        let layers = held_out.model.routed.len();
        let languages = &self.curriculum.languages;
        let mut judgement = Judgement::new(&self.adapter, layers, languages.len());
        let texts = languages.iter().map(|text| text.held_out(TOKENS));
        let texts = texts.collect::<rankmix::Result<Vec<_>>>()?;
        let tokens: usize = texts.iter().flatten().map(|(_, bytes)| bytes).sum();
        let mut angles = Angles::new(tokens * looks.len());
        let mut outputs = held_out.outputs.clone();
        let judged = outputs.len();
        outputs.extend(looks.iter().flat_map(Look::outputs));
        for (language, batches) in texts.into_iter().enumerate() {
            let mut start = 0;
            for (batch, bytes) in batches {
                held_out.write(session, &batch)?;
                let results = session.run_reading_async(&outputs).await?;
                let (judged, mut rest) = results.split_at(judged);
                judgement.add(language, bytes, judged);
                for (layer, look) in looks.iter().enumerate() {
                    let (here, others) = rest.split_at(look.outputs().len());
                    rest = others;
                    let experts = &judged[1 + 2 * layer];
                    let spot = Spot {
                        layer,
                        language,
                        start,
                        tokens: bytes,
                    };
                    angles.add(look, here, experts, spot);
                }
                start += bytes;
            }
        }
        let (bits, shares) = judgement.finish();
        let experts = shares.first().map_or(0, Vec::len);
        let shares: Vec<f64> = shares.into_iter().flatten().flatten().collect();
        let inspection = object(&[
            ("bits", Float64Array::from(&bits[..]).into()),
            ("layers", JsValue::from(layers as u32)),
            ("experts", JsValue::from(experts as u32)),
            ("shares", Float64Array::from(&shares[..]).into()),
        ])?;
        set(&inspection, &angles.fields())?;
        Ok(inspection.into())
    }
}

fn set(object: &Object, fields: &[(&str, JsValue)]) -> Result<(), Failure> {
    for (name, value) in fields {
        Reflect::set(object, &JsValue::from(*name), value)
            .map_err(|_| Failure::new("Rankmix", format!("`{name}` could not be set")))?;
    }
    Ok(())
}

/// A plain object.
pub fn object(fields: &[(&str, JsValue)]) -> Result<Object, Failure> {
    let object = Object::new();
    set(&object, fields)?;
    Ok(object)
}

/// A base or an adapter that is being trained.
#[wasm_bindgen]
pub struct Trainer {
    name: String,
    parameters: usize,
    store: ParameterStore,
    /// The parameters that an adapter on this one shares.
    weights: Rc<Vec<String>>,
    /// Empty while a promise works with it.
    work: Rc<RefCell<Option<Work>>>,
}

/// Which of the two things a trainer is to do.
#[derive(Clone, Copy)]
enum Task {
    Step,
    Inspect,
}

impl Trainer {
    /// A trainer of the adapter, on the weights of `base` if there is one. What the base's own training changes later, changes
    /// here too: there is one copy of it.
    pub(crate) async fn new(
        adapter: Adapter,
        store: ParameterStore,
        base: Option<(ParameterStore, Rc<Vec<String>>)>,
        curriculum: Curriculum,
        schedule: Schedule,
        seed: u64,
    ) -> Result<Self, Failure> {
        if let Some((from, weights)) = &base {
            for name in weights.iter() {
                store.share(name, from)?;
            }
        }
        let step = StepGraph::new(&adapter)?;
        store.initialize_async(&step.graph, seed).await?;
        let options = SessionOptions::default();
        let session = step.graph.compile_async(&store, options).await?;
        let weights = step.graph.parameters().iter().map(|spec| spec.name.clone());
        let weights = weights.filter(|name| !name.starts_with("adamw."));
        Ok(Self {
            name: adapter.title(),
            parameters: step.graph.trainable_elements(),
            store: store.clone(),
            weights: Rc::new(weights.collect()),
            work: Rc::new(RefCell::new(Some(Work {
                adapter,
                store,
                curriculum,
                training: step.in_session(session, schedule, seed),
                inspector: None,
            }))),
        })
    }

    /// The store and the names of the weights, for an adapter.
    pub fn weights(&self) -> (ParameterStore, Rc<Vec<String>>) {
        (self.store.clone(), Rc::clone(&self.weights))
    }

    /// The promise keeps what it works with: the page may free the trainer meanwhile.
    fn promise(&self, task: Task) -> Promise {
        let slot = Rc::clone(&self.work);
        future_to_promise(async move {
            let Some(mut work) = slot.take() else {
                return Err(JsValue::from(Failure::new(
                    "Busy",
                    "this trainer is at work: await its last promise before the next call",
                )));
            };
            let outcome = match task {
                Task::Step => work.step().await,
                Task::Inspect => work.inspect().await,
            };
            slot.replace(Some(work));
            Ok(outcome?)
        })
    }
}

#[wasm_bindgen]
impl Trainer {
    /// What is trained.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// How many numbers are trained.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// One training step; the training loss in bits per byte.
    #[wasm_bindgen(unchecked_return_type = "Promise<number>")]
    pub fn step(&self) -> Promise {
        self.promise(Task::Step)
    }

    /// Judges the model on the held-out text of every language.
    #[wasm_bindgen(unchecked_return_type = "Promise<Inspection>")]
    pub fn inspect(&self) -> Promise {
        self.promise(Task::Inspect)
    }
}
