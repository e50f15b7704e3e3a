//! An MoE out of a dense feed-forward: all experts together are the dense layer.
//!
//! The neurons are split into experts of equal size, so that Σ_i E_i(x) is the dense output. An MoE gives Σ_i g_i E_i(x) over the chosen, and its gates depend on
//! the logits that choose. Both can be had, because the choice does not change when all logits are multiplied by one positive number, while the softmax of small logits is uniform: the
//! router is multiplied by so small a power of two that exp(logit) rounds to 1 in 32 bits. The gates are then 1/k (renormalised over the chosen) or 1/E (over all), exactly,
//! and the down projections are multiplied by k or E.

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
/// # Errors
/// [`Error::Setting`] if E does not divide the intermediate width, `top_k` is not between 1 and E or there are fewer than 4 tokens;
/// [`Error::Shape`] if the matrices or the activations do not fit each other; [`Error::NotFinite`] if one of them holds a NaN or an infinity.
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
    let [gate, up, down] = [&dense.gate, &dense.up, &dense.down].map(Tensor::to_f32);
    let neuron_to_expert = equal_clusters(MatRef::from_row_major_slice(&gate, m, n), experts, seed);
    let mut neurons = vec![Vec::new(); experts];
    for (neuron, &expert) in neuron_to_expert.iter().enumerate() {
        neurons[expert].push(neuron);
    }

    let rows = |from: &[f32]| -> Vec<f32> {
        let rows = neurons.iter().flatten();
        rows.flat_map(|&neuron| &from[neuron * n..(neuron + 1) * n])
            .copied()
            .collect()
    };
    let columns = |scale: f32| -> Vec<f32> {
        let mut out = Vec::with_capacity(n * m);
        for neurons in &neurons {
            for row in down.chunks(m) {
                out.extend(neurons.iter().map(|&neuron| scale * row[neuron]));
            }
        }
        out
    };
    let (gate, up, plain_down) = (rows(&gate), rows(&up), columns(1.0));
    let tokens = activations.shape().dims()[0];
    let x = activations.to_f32();
    let x = MatRef::from_row_major_slice(&x, tokens, n);
    let size = m / experts;
    let outputs: Vec<Mat<f32>> = (0..experts)
        .into_par_iter()
        .map(|expert| {
            let part = expert * size * n..(expert + 1) * size * n;
            let projected = |weights: &[f32]| {
                product(
                    x,
                    MatRef::from_row_major_slice(weights, size, n).transpose(),
                )
            };
            let (gate, mut inside) = (projected(&gate[part.clone()]), projected(&up[part.clone()]));
            for column in 0..size {
                for row in 0..tokens {
                    inside[(row, column)] *= Activation::Silu.value(gate[(row, column)]);
                }
            }
            let down = MatRef::from_row_major_slice(&plain_down[part], n, size);
            product(inside.as_ref(), down.transpose())
        })
        .collect();
    let norms = Mat::from_fn(tokens, experts, |token, expert| {
        let row = outputs[expert].as_ref().subrows(token, 1);
        squared_norm(row).sqrt()
    });
    let fitted = tokens - tokens / 4;
    let router = router(x, &norms, fitted);
    let logits = product(x, router.transpose());
    let report = DenseReport {
        experts,
        top_k,
        gates,
        neuron_to_expert,
        tokens: fitted,
        held_out_tokens: tokens - fitted,
        kept_output: kept_output(&outputs, &logits, &norms, fitted, options),
    };
    let scale = match gates {
        DenseGates::Chosen => top_k,
        DenseGates::All => experts,
    };
    let moe = MoeExperts {
        gate: Tensor::f32([experts, size, n], gate)?,
        up: Tensor::f32([experts, size, n], up)?,
        down: Tensor::f32([experts, n, size], columns(scale as f32))?,
    };
    let router = (0..experts * n).map(|i| router[(i / n, i % n)]).collect();
    Ok((moe, Tensor::f32([experts, n], router)?, report))
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

/// The least-squares fit to the first `fitted` tokens, scaled so that softmax makes uniform gates of its logits.
fn router(x: MatRef<'_, f32>, norms: &Mat<f64>, fitted: usize) -> Mat<f32> {
    let (n, experts) = (x.ncols(), norms.ncols());
    let seen = x.subrows(0, fitted);
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

fn kept_output(
    outputs: &[Mat<f32>],
    logits: &Mat<f32>,
    norms: &Mat<f64>,
    fitted: usize,
    options: &DenseOptions,
) -> Vec<KeptOutput> {
    let (tokens, n) = (norms.nrows(), outputs[0].ncols());
    let experts = options.experts;
    let mut random = Gaussian::new(options.seed);
    let mut energy = 0.0;
    // Sums of squares of what the first k of three orders of the experts leave out.
    let mut missing = vec![[0.0_f64; 3]; experts];
    for token in fitted..tokens {
        let dense: Vec<f64> = (0..n)
            .map(|column| {
                outputs
                    .iter()
                    .map(|output| f64::from(output[(token, column)]))
                    .sum()
            })
            .collect();
        energy += dense.iter().map(|y| y * y).sum::<f64>();
        let shuffled: Vec<f64> = (0..experts).map(|_| random.uniform()).collect();
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
                missing[taken][which] += left.iter().map(|y| y * y).sum::<f64>();
            }
        }
    }
    let kept = |missing: f64| {
        if energy > 0.0 {
            1.0 - missing / energy
        } else {
            1.0
        }
    };
    (1..=experts)
        .filter(|&k| k.is_power_of_two() || k == options.top_k || k == experts)
        .map(|top_k| {
            let [router, random, largest] = missing[top_k - 1].map(kept);
            KeptOutput {
                top_k,
                router,
                random,
                largest,
            }
        })
        .collect()
}
