//! Which experts share their latents.

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::convert::latent::LatentOptions;
use crate::convert::latent_report::Operator;
use crate::convert::stack::Stacks;
use crate::convert::subspace::{Float, leading_row_space, product, squared_norm};
use crate::error::Result;

/// Consecutive experts: expert i of E is in group i / (E / G).
pub(crate) fn consecutive(experts: usize, groups: usize) -> Vec<usize> {
    let size = experts / groups;
    (0..experts).map(|expert| expert / size).collect()
}

/// Groups of one size whose experts are similar to each other, given a symmetric matrix of similarities.
///
/// Groups are filled one after another: the first expert is the one least similar to all that are left (it would be the hardest to place
/// later), then come the most similar to those already there. Experts of two groups then change places as long as that raises the sum
/// of similarities within groups (Kernighan and Lin's exchange). Ties go to the lower expert, and groups are numbered by their lowest expert, so that
/// the result depends on the similarities alone.
pub(crate) fn balanced_groups(similarity: MatRef<'_, f64>, groups: usize) -> Vec<usize> {
    let experts = similarity.nrows();
    let mut group_of = filled(similarity, groups);
    // What an expert's similarities to the members of each group add up to.
    let mut toward = Mat::<f64>::zeros(experts, groups);
    for a in 0..experts {
        for b in (0..experts).filter(|&b| b != a) {
            toward[(a, group_of[b])] += similarity[(a, b)];
        }
    }
    // Every exchange raises a sum that has finitely many values; the bound is for similarities that rounding makes equal.
    for _ in 0..experts {
        let mut changed = false;
        for a in 0..experts {
            for b in a + 1..experts {
                let (of_a, of_b) = (group_of[a], group_of[b]);
                if of_a == of_b {
                    continue;
                }
                let after = toward[(a, of_b)] + toward[(b, of_a)] - 2.0 * similarity[(a, b)];
                let before = toward[(a, of_a)] + toward[(b, of_b)];
                if after > before + 1e-9 {
                    for other in 0..experts {
                        let change = similarity[(other, b)] - similarity[(other, a)];
                        let [of_self_a, of_self_b] =
                            [a, b].map(|x| if x == other { similarity[(x, x)] } else { 0.0 });
                        toward[(other, of_a)] += change + of_self_a - of_self_b;
                        toward[(other, of_b)] -= change + of_self_a - of_self_b;
                    }
                    group_of.swap(a, b);
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    numbered_by_first(&group_of, groups)
}

fn filled(similarity: MatRef<'_, f64>, groups: usize) -> Vec<usize> {
    let experts = similarity.nrows();
    let mut group_of = vec![usize::MAX; experts];
    let largest = |group_of: &[usize], score: &dyn Fn(usize) -> f64| {
        let mut best: Option<(usize, f64)> = None;
        for expert in (0..experts).filter(|&e| group_of[e] == usize::MAX) {
            let score = score(expert);
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((expert, score));
            }
        }
        best.map(|(expert, _)| expert)
    };
    for group in 0..groups {
        for member in 0..experts / groups {
            let next = largest(&group_of, &|expert| {
                let total = |wanted: usize| {
                    (0..experts)
                        .filter(|&other| other != expert && group_of[other] == wanted)
                        .map(|other| similarity[(expert, other)])
                        .sum::<f64>()
                };
                if member == 0 {
                    -total(usize::MAX)
                } else {
                    total(group)
                }
            });
            if let Some(expert) = next {
                group_of[expert] = group;
            }
        }
    }
    group_of
}

fn numbered_by_first(group_of: &[usize], groups: usize) -> Vec<usize> {
    let mut number = vec![None; groups];
    let mut next = 0;
    group_of
        .iter()
        .map(|&group| {
            *number[group].get_or_insert_with(|| {
                next += 1;
                next - 1
            })
        })
        .collect()
}

/// Leading dimensions of a row space that are compared.
const COMPARED: usize = 64;

/// How similar experts are: over the operators, the sum of |V_i^T V_j|² / d, with the d leading right singular vectors V of each expert's rows. That is
/// the mean squared cosine of the principal angles between the two subspaces: 1 if they are one, d / n if they are unrelated.
pub(crate) fn similarity<T: Float>(
    stacks: &Stacks<'_, T>,
    experts: usize,
    operators: &[Operator],
    options: &LatentOptions,
) -> Result<Mat<f64>> {
    let [m, n] = stacks.extents;
    let compared = COMPARED.min(options.latent).min(m).min(n);
    let mut similarity = Mat::<f64>::zeros(experts, experts);
    for &operator in operators {
        let spaces = (0..experts)
            .into_par_iter()
            .map(|expert| {
                let rows = std::iter::once(Ok(stacks.rows(operator, expert)));
                Ok(leading_row_space(rows, m, n, compared, options.svd.method)?.basis)
            })
            .collect::<Result<Vec<_>>>()?;
        let overlaps: Vec<Vec<f64>> = (0..experts)
            .into_par_iter()
            .map(|a| {
                (0..=a)
                    .map(|b| {
                        let angles = product(spaces[a].transpose(), spaces[b].as_ref());
                        squared_norm(angles.as_ref()) / compared as f64
                    })
                    .collect()
            })
            .collect();
        for (a, row) in overlaps.iter().enumerate() {
            for (b, &overlap) in row.iter().enumerate() {
                similarity[(a, b)] += overlap;
                if a != b {
                    similarity[(b, a)] += overlap;
                }
            }
        }
    }
    Ok(similarity)
}
