//! Points around a few centres, each centre with a linear rule of its own that says which class a point is of: no single
//! linear map gets them right, a mixture of them does.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rankmix::{Result, Tensor};

pub const WIDTH: usize = 64;
pub const CLASSES: usize = 10;
const CENTRES: usize = 8;
/// How far points are from their centre, the centre being at about 1 in every coordinate.
const SPREAD: f32 = 0.8;

pub struct Task {
    seed: u64,
    /// `[CENTRES, WIDTH]`.
    centres: Vec<f32>,
    /// `[CENTRES, CLASSES, WIDTH]`.
    rules: Vec<f32>,
}

/// Numbers in -1..1.
fn numbers(generator: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| (generator.next_u32() >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

impl Task {
    pub fn new(seed: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        Self {
            seed,
            centres: numbers(&mut generator, CENTRES * WIDTH),
            rules: numbers(&mut generator, CENTRES * CLASSES * WIDTH),
        }
    }

    /// Points `[count, WIDTH]` and their classes `[count]`; other numbers, other points.
    pub fn batch(&self, count: usize, number: u64) -> Result<(Tensor, Tensor)> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        // Stream 0 made the task itself.
        generator.set_stream(number.wrapping_add(1).max(1));
        let mut points = Vec::with_capacity(count * WIDTH);
        let mut classes = Vec::with_capacity(count);
        for _ in 0..count {
            let centre = generator.next_u32() as usize % CENTRES;
            let offset = numbers(&mut generator, WIDTH);
            let score = |class: usize| -> f32 {
                let rule = &self.rules[(centre * CLASSES + class) * WIDTH..][..WIDTH];
                rule.iter().zip(&offset).map(|(w, x)| w * x).sum()
            };
            let best = (0..CLASSES).max_by(|&a, &b| score(a).total_cmp(&score(b)));
            classes.push(best.unwrap_or(0) as i32);
            let at = &self.centres[centre * WIDTH..][..WIDTH];
            points.extend(at.iter().zip(&offset).map(|(c, x)| c + SPREAD * x));
        }
        Ok((
            Tensor::f32([count, WIDTH], points)?,
            Tensor::i32([count], classes)?,
        ))
    }
}
