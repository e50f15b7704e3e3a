//! How tokens spread over experts: the choices themselves, and inputs and routers that make them.

use rankmix::Tensor;

use crate::case::floats_in;

/// How tokens spread over experts.
#[derive(Clone, Copy, Debug)]
pub enum Popularity {
    /// Every slot a different expert, round and round.
    Distinct,
    /// At random.
    Uniform,
    /// The first experts take most.
    Zipf,
    /// Every token the same experts.
    Identical,
    /// One expert takes nearly all, some take none.
    Skewed,
}

impl Popularity {
    pub const ALL: [Self; 5] = [
        Self::Distinct,
        Self::Uniform,
        Self::Zipf,
        Self::Identical,
        Self::Skewed,
    ];
}

/// Experts for tokens, distinct within a token.
pub fn choose(popularity: Popularity, tokens: usize, top_k: usize, experts: usize) -> Tensor {
    let noise = floats_in(&[tokens, experts], 77, 0.0, 1.0).to_f64();
    let mut chosen = Vec::new();
    for token in 0..tokens {
        let score = |expert: usize| -> f64 {
            let noise = noise[token * experts + expert];
            match popularity {
                Popularity::Distinct => {
                    -(((expert + experts - token * top_k % experts) % experts) as f64)
                }
                Popularity::Uniform => noise,
                Popularity::Zipf => noise / ((expert + 1) as f64).powf(1.5),
                Popularity::Identical => -(expert as f64),
                Popularity::Skewed => {
                    if expert == experts / 2 {
                        2.0
                    } else if expert < 2 {
                        noise
                    } else {
                        -noise
                    }
                }
            }
        };
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        chosen.extend(order[..top_k].iter().map(|&expert| expert as i32));
    }
    Tensor::i32([tokens, top_k], chosen).expect("top_k experts a token")
}

/// Rows `[tokens, width]`, at least as wide as there are experts, that [`router`] sends where the popularity says: the router looks at one
/// coordinate for each expert, and that of a token's experts is large. Logits are far apart, so that rounding does not decide
/// which experts are chosen.
pub fn rows(
    popularity: Popularity,
    [tokens, width]: [usize; 2],
    top_k: usize,
    experts: usize,
) -> Tensor {
    let mut x = floats_in(&[tokens, width], 400, -0.5, 0.5).to_f64();
    let chosen = choose(popularity, tokens, top_k, experts);
    let chosen = chosen.as_i32().unwrap_or_default();
    for (token, chosen) in chosen.chunks(top_k).enumerate() {
        for (slot, &expert) in chosen.iter().enumerate() {
            x[token * width + expert as usize] += 1.5 + 0.2 * (top_k - 1 - slot) as f64;
        }
    }
    // Rounded, so that every device sees the same numbers.
    let x = x.into_iter().map(|x| f64::from(x as f32)).collect();
    Tensor::f64([tokens, width], x).expect("as many elements as the shape says")
}

/// The router `[experts, width]` for such rows.
pub fn router(experts: usize, width: usize) -> Tensor {
    let mut weight = floats_in(&[experts, width], 401, -0.02, 0.02).to_f64();
    for expert in 0..experts {
        weight[expert * width + expert] = 1.0;
    }
    Tensor::f64([experts, width], weight).expect("as many elements as the shape says")
}
