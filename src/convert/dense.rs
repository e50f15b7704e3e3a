//! An MoE out of a dense feed-forward: all experts together are the dense layer.
//!
//! The neurons are split into experts of equal size, so that Σ_i E_i(x) is the dense output. An MoE gives Σ_i g_i E_i(x) over the chosen, and its gates depend on
//! the logits that choose. Both can be had, because the choice does not change when all logits are multiplied by one positive number, while the softmax of small logits is uniform: the
//! router is multiplied by so small a power of two that exp(logit) rounds to 1 in 32 bits. The gates are then 1/k (renormalised over the chosen) or 1/E (over all), exactly,
//! and the down projections are multiplied by k or E.

use std::borrow::Cow;

use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::{Mat, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::convert::calibration::lower_of_moments;
use crate::convert::clusters::equal_clusters;
use crate::convert::gaussian::Gaussian;
use crate::convert::subspace::{product, squared_norm};
use crate::error::{Error, Result};
use crate::formats::MoeExperts;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// What is added to the diagonal of the least squares, as a part of its mean: some thousand tokens say little of some hundred directions.
const RIDGE: f64 = 0.1;
/// The largest logit of the activations that the router is made with, as an exponent of 2. exp(x) rounds to 1 in 32 bits below 2^-25: this leaves inputs
/// that are 64 times as large.
const LARGEST_LOGIT: i32 = -31;

/// Tokens whose outputs of all experts are in memory at once.
const BLOCK_TOKENS: usize = 256;

/// A gated feed-forward layer, `down (silu(gate x) * (up x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseFeedForward {
    /// `[m, n]`.
    pub gate: Tensor,
    /// `[m, n]`.
    pub up: Tensor,
    /// `[n, m]`.
    pub down: Tensor,
}

/// What the gates of the mixture are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenseGates {
    /// 1/k: the softmax over the chosen, as Mixtral has it. The down projections are multiplied by k, and the mixture is for that k alone.
    Chosen,
    /// 1/E: the softmax over all, as Qwen-MoE has it without `norm_topk_prob`. The down projections are multiplied by E, whatever k is.
    All,
}

/// How a dense layer becomes an MoE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DenseOptions {
    /// E; must divide the intermediate width.
    pub experts: usize,
    /// How many experts a token takes.
    pub top_k: usize,
    /// What the gates are.
    pub gates: DenseGates,
    /// Of the first means of the clusters, and of the choices that the report compares with.
    pub seed: u64,
}

impl DenseOptions {
    /// Checks that they fit a layer of so many neurons.
    ///
    /// # Errors
    /// [`Error::Setting`] if E does not divide their number, or `top_k` is not between 1 and E.
    pub fn check(&self, neurons: usize) -> Result<()> {
        let Self { experts, top_k, .. } = *self;
        if experts == 0 || !neurons.is_multiple_of(experts) {
            return Err(Error::setting(
                "experts",
                experts,
                format!("must divide the {neurons} neurons of the layer into experts of one size"),
            ));
        }
        if top_k == 0 || top_k > experts {
            return Err(Error::setting(
                "top_k",
                top_k,
                format!("must be between 1 and the {experts} experts"),
            ));
        }
        Ok(())
    }
}

/// The part of the dense output's energy that the sum of some experts keeps: 1 - Σ|y - y_k|² / Σ|y|² over tokens that the router was not made with. Negative
/// where the experts that are left out cancel others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptOutput {
    /// How many experts a token takes.
    pub top_k: usize,
    /// Those that the router chooses.
    pub router: f64,
    /// Those chosen at random.
    pub random: f64,
    /// Those with the largest outputs: what a perfect router would choose.
    pub largest: f64,
}

/// What became of a dense layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DenseReport {
    /// E.
    pub experts: usize,
    /// How many experts a token takes.
    pub top_k: usize,
    /// What the gates are.
    pub gates: DenseGates,
    /// The expert of each neuron.
    pub neuron_to_expert: Vec<usize>,
    /// Tokens that the router was made with.
    pub tokens: usize,
    /// Tokens that outputs were compared for.
    pub held_out_tokens: usize,
    /// For 1, 2, 4 and so on experts, for `top_k` and for all of them.
    pub kept_output: Vec<KeptOutput>,
}

/// Inputs as a feed-forward layer has them after its norm: directions evenly at random, of root mean square 1, times the norm's weights. What a token's
/// direction really is depends on the layers before; real activations make a better router.
///
/// # Errors
/// [`Error::Shape`] if the weights are not a vector.
pub fn normed_inputs(norm: &Tensor, tokens: usize, seed: u64) -> Result<Tensor> {
    if norm.shape().rank() != 1 {
        return Err(Error::shape(
            "norm",
            format!("{:?}: [hidden] is expected", norm.shape().dims()),
        ));
    }
    let weights = norm.to_f64();
    let mut random = Gaussian::new(seed);
    let mut data = Vec::with_capacity(tokens * weights.len());
    for _ in 0..tokens {
        let direction: Vec<f64> = weights.iter().map(|_| random.next()).collect();
        let square = direction.iter().map(|x| x * x).sum::<f64>() / weights.len() as f64;
        let scale = 1.0 / square.sqrt();
        data.extend(
            direction
                .iter()
                .zip(&weights)
                .map(|(x, w)| (x * scale * w) as f32),
        );
    }
    Tensor::f32([tokens, weights.len()], data)
}

/// Splits a dense feed-forward layer into experts, and makes a router for them: `[E, n]`.
///
/// Neurons are put together by their gate rows, by k-means with clusters of one size. The router is the least-squares fit of how large each expert's output is, |E_i(x)|
/// less the mean over experts, to three quarters of `activations` (`[tokens, n]`); the report is about the last quarter. With `top_k` = E the mixture's output is the
/// dense layer's but for the rounding of sums.
///
/// Experts are spread over rayon's threads, and the result does not depend on how many there are. Memory besides the layer and as much again for its experts: 4 n bytes a token for
/// the activations, and at the peak either 8 n + 24 E for each of those that the router is fitted to and 8 n² for their moments, or the outputs of 256 tokens, 4 E n bytes each. With
/// n = 4096, E = 64 and 4 n tokens that is 0.8 GiB.
///
/// # Errors
/// [`Error::Setting`] if E does not divide the intermediate width, `top_k` is not between 1 and E or there are fewer than 4 tokens;
/// [`Error::Shape`] if the matrices or the activations do not fit each other; [`Error::NotFinite`] if one of them holds a NaN or an infinity, or
/// the outputs are beyond 32 bits.
pub fn split_dense(
    dense: &DenseFeedForward,
    activations: &Tensor,
    options: &DenseOptions,
) -> Result<(MoeExperts, Tensor, DenseReport)> {
    let DenseOptions {
        experts,
        top_k,
        gates,
        seed,
    } = *options;
    let [m, n] = check(dense, activations, options)?;
    let size = m / experts;
    let (neuron_to_expert, mut parts) = {
        let gate = floats(&dense.gate);
        let neuron_to_expert =
            equal_clusters(MatRef::from_row_major_slice(&gate, m, n), experts, seed);
        let parts = ExpertParts::new(dense, &neuron_to_expert, [experts, size, n]);
        (neuron_to_expert, parts)
    };
    let tokens = activations.shape().dims()[0];
    let x = floats(activations);
    let x = MatRef::from_row_major_slice(&x, tokens, n);
    let fitted = tokens - tokens / 4;
    let mut norms = Mat::zeros(fitted, experts);
    for (start, block) in blocks(x.subrows(0, fitted)) {
        let found = norms_of(&parts.outputs(block));
        let place = norms.as_mut().subrows_mut(start, block.nrows());
        { place }.copy_from(found);
    }
    let odd = (0..fitted).find(|&token| (0..experts).any(|e| !norms[(token, e)].is_finite()));
    if let Some(element) = odd {
        let value = "the outputs of the experts for the activations, by tokens,".to_owned();
        return Err(Error::NotFinite { value, element });
    }
    let router = router(x.subrows(0, fitted), &norms);
    let mut kept = Kept::new(options);
    for (_, block) in blocks(x.subrows(fitted, tokens - fitted)) {
        let logits = product(block, router.transpose());
        kept.add(&parts.outputs(block), &logits);
    }
    let report = DenseReport {
        experts,
        top_k,
        gates,
        neuron_to_expert,
        tokens: fitted,
        held_out_tokens: tokens - fitted,
        kept_output: kept.report(top_k),
    };
    let scale = match gates {
        DenseGates::Chosen => top_k,
        DenseGates::All => experts,
    } as f32;
    parts.down.iter_mut().for_each(|weight| *weight *= scale);
    let moe = MoeExperts {
        gate: Tensor::f32([experts, size, n], parts.gate)?,
        up: Tensor::f32([experts, size, n], parts.up)?,
        down: Tensor::f32([experts, n, size], parts.down)?,
    };
    let router = (0..experts * n).map(|i| router[(i / n, i % n)]).collect();
    Ok((moe, Tensor::f32([experts, n], router)?, report))
}

/// A tensor's elements in 32 bits, copied only if they are in others.
fn floats(tensor: &Tensor) -> Cow<'_, [f32]> {
    match tensor.as_f32() {
        Some(elements) => elements.into(),
        None => tensor.to_f32().into(),
    }
}

/// [`BLOCK_TOKENS`] rows at a time, and the number of the first of them.
fn blocks(rows: MatRef<'_, f32>) -> impl Iterator<Item = (usize, MatRef<'_, f32>)> {
    (0..rows.nrows()).step_by(BLOCK_TOKENS).map(move |start| {
        let count = BLOCK_TOKENS.min(rows.nrows() - start);
        (start, rows.subrows(start, count))
    })
}

/// |E_i(x)| for each token and expert.
fn norms_of(outputs: &[Mat<f32>]) -> Mat<f64> {
    let tokens = outputs.first().map_or(0, Mat::nrows);
    Mat::from_fn(tokens, outputs.len(), |token, expert| {
        squared_norm(outputs[expert].as_ref().subrows(token, 1)).sqrt()
    })
}

/// The neurons of a dense layer, in the order of the experts.
struct ExpertParts {
    /// `[E, m / E, n]`.
    gate: Vec<f32>,
    /// `[E, m / E, n]`.
    up: Vec<f32>,
    /// `[E, n, m / E]`.
    down: Vec<f32>,
    /// E, m / E and n.
    extents: [usize; 3],
}

impl ExpertParts {
    fn new(dense: &DenseFeedForward, neuron_to_expert: &[usize], extents: [usize; 3]) -> Self {
        let [experts, size, n] = extents;
        let m = experts * size;
        let mut neurons = vec![Vec::new(); experts];
        for (neuron, &expert) in neuron_to_expert.iter().enumerate() {
            neurons[expert].push(neuron);
        }
        let rows = |from: &Tensor| {
            let from = floats(from);
            let mut out = Vec::with_capacity(m * n);
            for &neuron in neurons.iter().flatten() {
                out.extend_from_slice(&from[neuron * n..(neuron + 1) * n]);
            }
            out
        };
        let (gate, up) = (rows(&dense.gate), rows(&dense.up));
        let from = floats(&dense.down);
        let mut down = Vec::with_capacity(n * m);
        for neurons in &neurons {
            for row in from.chunks(m) {
                down.extend(neurons.iter().map(|&neuron| row[neuron]));
            }
        }
        Self {
            gate,
            up,
            down,
            extents,
        }
    }

    /// E_i(x) of each expert for each row of `x`.
    fn outputs(&self, x: MatRef<'_, f32>) -> Vec<Mat<f32>> {
        let [experts, size, n] = self.extents;
        (0..experts)
            .into_par_iter()
            .map(|expert| {
                let part = expert * size * n..(expert + 1) * size * n;
                let projected = |weights: &[f32]| {
                    let weights = MatRef::from_row_major_slice(weights, size, n);
                    product(x, weights.transpose())
                };
                let gate = projected(&self.gate[part.clone()]);
                let mut inside = projected(&self.up[part.clone()]);
                for column in 0..size {
                    for row in 0..x.nrows() {
                        inside[(row, column)] *= Activation::Silu.value(gate[(row, column)]);
                    }
                }
                let down = MatRef::from_row_major_slice(&self.down[part], n, size);
                product(inside.as_ref(), down.transpose())
            })
            .collect()
    }
}

fn check(
    dense: &DenseFeedForward,
    activations: &Tensor,
    options: &DenseOptions,
) -> Result<[usize; 2]> {
    let two = |what: &'static str, tensor: &Tensor| {
        <[usize; 2]>::try_from(tensor.shape().dims()).map_err(|_| {
            Error::shape(
                what,
                format!("{:?}: a matrix is expected", tensor.shape().dims()),
            )
        })
    };
    let [m, n] = two("gate", &dense.gate)?;
    for (what, tensor, expected) in [("up", &dense.up, [m, n]), ("down", &dense.down, [n, m])] {
        let found = two(what, tensor)?;
        if found != expected {
            return Err(Error::shape(
                what,
                format!("{found:?}: {expected:?} is expected"),
            ));
        }
    }
    let [tokens, width] = two("activations", activations)?;
    if width != n {
        return Err(Error::shape(
            "activations",
            format!("[{tokens}, {width}]: the layer's hidden width is {n}"),
        ));
    }
    for (what, tensor) in [
        ("the gate projection", &dense.gate),
        ("the up projection", &dense.up),
        ("the down projection", &dense.down),
        ("the activations", activations),
    ] {
        if let Some(element) = tensor.first_not_finite() {
            return Err(Error::NotFinite {
                value: what.into(),
                element,
            });
        }
    }
    options.check(m)?;
    if tokens < 4 {
        return Err(Error::setting("tokens", tokens, "at least 4 make a router"));
    }
    Ok([m, n])
}

/// The least-squares fit of `norms` to the tokens `seen`, scaled so that softmax makes uniform gates of its logits.
fn router(seen: MatRef<'_, f32>, norms: &Mat<f64>) -> Mat<f32> {
    let (fitted, n, experts) = (seen.nrows(), seen.ncols(), norms.ncols());
    let Some(lower) = lower_of_moments(seen, RIDGE) else {
        return Mat::zeros(experts, n);
    };
    // What all experts have in common does not choose between them.
    let targets = Mat::from_fn(fitted, experts, |token, expert| {
        let mean = (0..experts).map(|e| norms[(token, e)]).sum::<f64>() / experts as f64;
        (norms[(token, expert)] - mean) / fitted as f64
    });
    let wide = Mat::from_fn(fitted, n, |row, column| f64::from(seen[(row, column)]));
    let mut solution = product(wide.transpose(), targets.as_ref());
    solve_lower_triangular_in_place(lower.as_ref(), solution.as_mut(), Par::Seq);
    solve_upper_triangular_in_place(lower.transpose(), solution.as_mut(), Par::Seq);
    let logits = product(wide.as_ref(), solution.as_ref());
    let largest = (0..experts)
        .flat_map(|expert| (0..fitted).map(move |token| (token, expert)))
        .fold(0.0_f64, |largest, at| largest.max(logits[at].abs()));
    let scale = if largest > 0.0 {
        2.0_f64.powi(LARGEST_LOGIT - largest.log2().ceil() as i32)
    } else {
        1.0
    };
    Mat::from_fn(experts, n, |expert, column| {
        (solution[(column, expert)] * scale) as f32
    })
}

/// What some experts keep of the outputs of tokens.
struct Kept {
    random: Gaussian,
    /// The sum of squares of the dense outputs.
    energy: f64,
    /// Sums of squares of what the first k of three orders of the experts leave out.
    missing: Vec<[f64; 3]>,
}

impl Kept {
    fn new(options: &DenseOptions) -> Self {
        Self {
            random: Gaussian::new(options.seed),
            energy: 0.0,
            missing: vec![[0.0; 3]; options.experts],
        }
    }

    /// Adds tokens with the outputs of all experts, `[tokens, n]` each, and their logits.
    fn add(&mut self, outputs: &[Mat<f32>], logits: &Mat<f32>) {
        let norms = norms_of(outputs);
        let (tokens, experts) = (norms.nrows(), norms.ncols());
        let n = outputs.first().map_or(0, Mat::ncols);
        for token in 0..tokens {
            let dense: Vec<f64> = (0..n)
                .map(|column| {
                    outputs
                        .iter()
                        .map(|output| f64::from(output[(token, column)]))
                        .sum()
                })
                .collect();
            self.energy += dense.iter().map(|y| y * y).sum::<f64>();
            let shuffled: Vec<f64> = (0..experts).map(|_| self.random.uniform()).collect();
            let scores: [&dyn Fn(usize) -> f64; 3] = [
                &|expert| f64::from(logits[(token, expert)]),
                &|expert| shuffled[expert],
                &|expert| norms[(token, expert)],
            ];
            for (which, score) in scores.into_iter().enumerate() {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
                let mut left = dense.clone();
                for (taken, &expert) in order.iter().enumerate() {
                    for (column, left) in left.iter_mut().enumerate() {
                        *left -= f64::from(outputs[expert][(token, column)]);
                    }
                    self.missing[taken][which] += left.iter().map(|y| y * y).sum::<f64>();
                }
            }
        }
    }

    /// For 1, 2, 4 and so on experts, for `top_k` and for all of them.
    fn report(&self, top_k: usize) -> Vec<KeptOutput> {
        let kept = |missing: f64| {
            if self.energy > 0.0 {
                1.0 - missing / self.energy
            } else {
                1.0
            }
        };
        let experts = self.missing.len();
        (1..=experts)
            .filter(|&k| k.is_power_of_two() || k == top_k || k == experts)
            .map(|top_k| {
                let [router, random, largest] = self.missing[top_k - 1].map(kept);
                KeptOutput {
                    top_k,
                    router,
                    random,
                    largest,
                }
            })
            .collect()
    }
}
