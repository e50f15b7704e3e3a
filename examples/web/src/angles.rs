//! By how much RotMoLE turns the latents, for a picture: angles of planes where the rotation is made of them, elsewhere the angle between a
//! latent before and after it.

use js_sys::{Float32Array, Uint8Array};
use rankmix::layers::RotatedLatents;
use rankmix::ops::Rotation;
use rankmix::{Tensor, Value};
use wasm_bindgen::JsValue;

use crate::model::Adapter;

/// Every so many tokens of a batch are looked at.
const EVERY: usize = 4;

/// What is read of a rotated layer.
pub enum Look {
    /// The generator's numbers are angles.
    Planes(RotatedLatents),
    /// The latents are compared.
    Turn(RotatedLatents),
}

impl Look {
    pub fn new(adapter: &Adapter, latents: RotatedLatents) -> Self {
        match adapter {
            Adapter::RotMole {
                rotation: Rotation::Cayley | Rotation::Householder,
                ..
            } => Self::Turn(latents),
            _ => Self::Planes(latents),
        }
    }

    pub fn outputs(&self) -> Vec<Value> {
        match self {
            Self::Planes(latents) => vec![latents.generator],
            Self::Turn(latents) => vec![latents.before, latents.after],
        }
    }

    /// The angles of a batch, a row for each pair of a token and an expert.
    fn rows(&self, results: &[Tensor]) -> Vec<Vec<f32>> {
        let width = results[0].shape().last();
        let first = results[0].to_f32();
        match self {
            Self::Planes(_) => first.chunks(width).map(<[f32]>::to_vec).collect(),
            Self::Turn(_) => {
                let after = results[1].to_f32();
                let pairs = first.chunks(width).zip(after.chunks(width));
                pairs.map(|(a, b)| vec![turn(a, b)]).collect()
            }
        }
    }
}

/// The angle between two vectors of the same length; 0 where there is none.
fn turn(a: &[f32], b: &[f32]) -> f32 {
    let (mut difference, mut sum) = (0.0_f64, 0.0_f64);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        difference += (a - b) * (a - b);
        sum += (a + b) * (a + b);
    }
    // Accurate for small angles too, where an arc cosine has no digits left.
    (2.0 * difference.sqrt().atan2(sum.sqrt())) as f32
}

/// Angles of many batches.
#[derive(Default)]
pub struct Angles {
    angles: Vec<f32>,
    count: usize,
    experts: Vec<u8>,
    languages: Vec<u8>,
    layers: Vec<u8>,
    turns: bool,
}

impl Angles {
    /// Adds what a layer made of a batch, of which so many tokens were text. `chosen` are its experts, `[tokens, top_k]`.
    pub fn add(
        &mut self,
        look: &Look,
        results: &[Tensor],
        chosen: &Tensor,
        tokens: usize,
        [layer, language]: [usize; 2],
    ) {
        self.turns = matches!(look, Look::Turn(_));
        let slots = chosen.shape().last();
        let experts = chosen.as_i32().unwrap_or_default();
        let rows = look.rows(results);
        for token in (0..tokens).step_by(EVERY) {
            for pair in token * slots..(token + 1) * slots {
                self.count = rows[pair].len();
                self.angles.extend_from_slice(&rows[pair]);
                self.experts.push(experts[pair] as u8);
                self.languages.push(language as u8);
                self.layers.push(layer as u8);
            }
        }
    }

    /// The fields of an `Inspection`.
    pub fn fields(&self) -> [(&'static str, JsValue); 6] {
        let bytes = |values: &[u8]| JsValue::from(Uint8Array::from(values));
        [
            ("angles", Float32Array::from(&self.angles[..]).into()),
            ("angle_count", JsValue::from(self.count as u32)),
            ("angle_expert", bytes(&self.experts)),
            ("angle_language", bytes(&self.languages)),
            ("angle_layer", bytes(&self.layers)),
            (
                "angle_kind",
                JsValue::from(if self.turns { "turn" } else { "plane" }),
            ),
        ]
    }
}
