//! By how much RotMoLE turns the latents, for a picture: angles of planes where the rotation is made of them, elsewhere the angle between a
//! latent before and after it.

use js_sys::{Float32Array, Uint8Array};
use rankmix::layers::RotatedLatents;
use rankmix::ops::Rotation;
use rankmix::{Tensor, Value};
use wasm_bindgen::JsValue;

use crate::model::Adapter;

/// Of so many tokens one is looked at, or of more where there would be too many angles.
const EVERY: usize = 4;
/// More angles than these are no more to see, and a Givens chain has up to thousands a row.
const MOST: usize = 1 << 19;

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

    /// The angles of a batch, row after row, and how many a row has.
    fn rows(&self, results: &[Tensor]) -> (Vec<f32>, usize) {
        let width = results[0].shape().last();
        let first = results[0].to_f32();
        match self {
            Self::Planes(_) => (first, width),
            Self::Turn(_) => {
                let after = results[1].to_f32();
                let pairs = first.chunks(width).zip(after.chunks(width));
                (pairs.map(|(a, b)| turn(a, b)).collect(), 1)
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

/// Angles of many batches: an entry for each pair of a token and an expert that is looked at.
pub struct Angles {
    /// Tokens in all layers and languages.
    all: usize,
    angles: Vec<f32>,
    count: usize,
    experts: Vec<u8>,
    languages: Vec<u8>,
    layers: Vec<u8>,
    turns: bool,
}

/// Where a batch of a language's text is, and in which layer.
#[derive(Clone, Copy)]
pub struct Spot {
    pub layer: usize,
    pub language: usize,
    /// The batch's first token, in the text.
    pub start: usize,
    /// How many of the batch's tokens are text.
    pub tokens: usize,
}

impl Angles {
    /// For so many tokens in all layers and languages.
    pub fn new(all: usize) -> Self {
        Self {
            all,
            angles: Vec::new(),
            count: 0,
            experts: Vec::new(),
            languages: Vec::new(),
            layers: Vec::new(),
            turns: false,
        }
    }

    /// Adds what a layer made of a batch. `chosen` are its experts, `[tokens, top_k]`.
    pub fn add(&mut self, look: &Look, results: &[Tensor], chosen: &Tensor, spot: Spot) {
        self.turns = matches!(look, Look::Turn(_));
        let slots = chosen.shape().last();
        let experts = chosen.as_i32().unwrap_or_default();
        let (rows, width) = look.rows(results);
        self.count = width;
        // A row for each pair; or for each expert, where all tokens have one rotation.
        let by_pair = rows.len() == experts.len() * width;
        let every = (self.all * slots * width).div_ceil(MOST).max(EVERY);
        let first = spot.start.next_multiple_of(every) - spot.start;
        for token in (first..spot.tokens).step_by(every) {
            let pairs = experts.iter().enumerate();
            for (pair, &expert) in pairs.skip(token * slots).take(slots) {
                let row = if by_pair { pair } else { expert as usize };
                self.angles.extend_from_slice(&rows[row * width..][..width]);
                self.experts.push(expert as u8);
                self.languages.push(spot.language as u8);
                self.layers.push(spot.layer as u8);
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
