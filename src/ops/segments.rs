//! What the grouped operations share: expert weights, the pairs sorted by expert, and their halves on the host.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::{Real, Sorted, expect_i32};
use crate::tensor::{DType, Tensor, TensorType};

/// How the matrices of the experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[experts, out, in]`, as the weights of linear layers are.
    OutIn,
    /// `[experts, in, out]`.
    InOut,
}

impl Layout {
    pub(crate) fn flipped(self) -> Self {
        match self {
            Self::OutIn => Self::InOut,
            Self::InOut => Self::OutIn,
        }
    }
}

/// Which expert each (token, slot) pair belongs to, and the pairs sorted by expert: what grouped operations gather through.
/// Made by methods of [`Graph`] alone: kernels rely on its
/// indices being in range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    pub(crate) experts: Value,
    pub(crate) order: Value,
    pub(crate) offsets: Value,
    /// Whether there is one more segment than experts, for pairs that belong to none.
    pub(crate) none: bool,
}

impl Segments {
    /// The expert of each pair, as it was given.
    #[must_use]
    pub fn experts(&self) -> Value {
        self.experts
    }

    /// `i32 [pairs]`: the pairs sorted by expert. A pair's number is `token * top_k + slot`.
    #[must_use]
    pub fn order(&self) -> Value {
        self.order
    }

    /// `i32 [experts + 1]`: where each expert's pairs start in the order. With a segment of pairs that belong to no expert, which
    /// comes last, `i32 [experts + 2]`.
    #[must_use]
    pub fn offsets(&self) -> Value {
        self.offsets
    }
}

impl Graph {
    /// Sorts (token, slot) pairs by expert: `experts` holds integers in `0..count`, `[tokens, top_k]` or of any other shape.
    ///
    /// # Errors
    /// As [`Graph::sort_by_key`].
    pub fn segments(&mut self, experts: Value, count: usize) -> Result<Segments> {
        let Sorted { order, offsets } = self.sort_by_key(experts, count)?;
        Ok(Segments {
            experts,
            order,
            offsets,
            none: false,
        })
    }

    /// As [`Graph::segments`], with `count` itself for a pair that belongs to no expert: grouped products give it zeros, nothing is added
    /// for it, and no weight sees it.
    ///
    /// # Errors
    /// As [`Graph::sort_by_key`].
    pub fn segments_with_none(&mut self, experts: Value, count: usize) -> Result<Segments> {
        Ok(Segments {
            none: true,
            ..self.segments(experts, count + 1)?
        })
    }
}

/// The extents of `[experts, ...]` weights as (experts, out, in).
pub(crate) fn weight_sizes(
    op: &'static str,
    weight: &TensorType,
    layout: Layout,
) -> Result<(usize, usize, usize)> {
    match *weight.dims() {
        [experts, a, b] if weight.dtype == DType::F32 => {
            let (out, input) = if layout == Layout::OutIn {
                (a, b)
            } else {
                (b, a)
            };
            Ok((experts, out, input))
        }
        _ => Err(Error::shape(
            op,
            format!("the weights are {weight}, expected f32 [experts, rows, columns]"),
        )),
    }
}

/// Checks the sorted pairs of an operation on `experts` experts, and one more segment with `none`; returns how many pairs there
/// are.
pub(crate) fn expect_segments(
    op: &'static str,
    order: &TensorType,
    offsets: &TensorType,
    experts: usize,
    none: bool,
) -> Result<usize> {
    let segments = experts + usize::from(none);
    expect_i32(op, "the offsets", offsets, &[segments + 1])?;
    let pairs = order.elements();
    expect_i32(op, "the order", order, &[pairs])?;
    Ok(pairs)
}

/// Experts, order and offsets of these types, every expert having as many pairs as the others, or one more: what a trained router is near to.
pub(crate) fn spread_evenly(experts: usize, types: &[TensorType]) -> Result<Option<Vec<Tensor>>> {
    let [of_pairs, order, offsets] = types else {
        return Ok(None);
    };
    if experts == 0 {
        return Ok(None);
    }
    let pairs = order.elements();
    let integers = |ty: &TensorType, numbers: Vec<usize>| {
        let numbers = numbers.into_iter().map(|number| number as i32);
        Tensor::i32(ty.shape.clone(), numbers.collect())
    };
    let sorted = (0..experts).flat_map(|expert| (expert..pairs).step_by(experts));
    // How many pairs the experts in front have; nobody is without one.
    let in_front = (0..offsets.elements()).map(|expert| {
        let expert = expert.min(experts);
        expert * (pairs / experts) + expert.min(pairs % experts)
    });
    Ok(Some(vec![
        integers(of_pairs, (0..pairs).map(|pair| pair % experts).collect())?,
        integers(order, sorted.collect())?,
        integers(offsets, in_front.collect())?,
    ]))
}

/// The invocations of a workgroup that work on tiles of a segment, along the pairs and along the outputs, for a kernel in which each has
/// `tile` of both.
pub(crate) fn lanes([pairs, segments, out]: [usize; 3], tile: [usize; 2]) -> (usize, usize) {
    const WORKGROUP: usize = 64;
    // Half as many pairs a workgroup as a segment has on average: a segment's last tile is half empty on average, with 64 experts of 16
    // pairs and tiles of 64 three quarters of all would be.
    let pairs = pairs.div_ceil(segments);
    let along_pairs = pairs.div_ceil(2 * tile[0]).next_power_of_two();
    let along_out = out.div_ceil(tile[1]).next_power_of_two();
    let along_out = along_out.min(WORKGROUP / along_pairs.min(WORKGROUP / 8));
    // Invocations that out does not need take more pairs.
    (along_pairs.min(WORKGROUP / along_out), along_out)
}

/// How many pairs share a row: `rows * share == pairs`.
pub(crate) fn row_share(op: &'static str, name: &str, rows: usize, pairs: usize) -> Result<usize> {
    if rows > 0 && pairs.is_multiple_of(rows) {
        Ok(pairs / rows)
    } else {
        Err(Error::shape(
            op,
            format!("{name} has {rows} rows, which do not divide {pairs} pairs"),
        ))
    }
}

/// The pairs of each expert on the host.
pub(crate) fn host_segments<'a>(order: &'a [i32], offsets: &[i32]) -> Vec<&'a [i32]> {
    offsets
        .windows(2)
        .map(|ends| &order[ends[0] as usize..ends[1] as usize])
        .collect()
}

/// Which row each pair reads, on the host.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RowOf<'a> {
    /// So many neighbouring pairs share a row.
    Share(usize),
    /// The row is in a table.
    Table(&'a [i32]),
}

impl RowOf<'_> {
    fn row(self, pair: usize) -> usize {
        match self {
            Self::Share(share) => pair / share,
            Self::Table(rows) => rows[pair] as usize,
        }
    }
}

/// Rows of `x` (`width` wide) for the pairs of a segment, each times its factor.
pub(crate) fn gather<R: Real>(
    x: &[R],
    width: usize,
    pairs: &[i32],
    row_of: RowOf<'_>,
    factor: impl Fn(usize) -> R,
) -> Vec<R> {
    let mut rows = Vec::with_capacity(pairs.len() * width);
    for &pair in pairs {
        let row = row_of.row(pair as usize);
        let factor = factor(pair as usize);
        rows.extend(
            x[row * width..(row + 1) * width]
                .iter()
                .map(|&x| x * factor),
        );
    }
    rows
}

/// For each expert, its gathered rows `[pairs, in]` times its matrix: `[pairs, out]`.
pub(crate) fn products<R: Real>(
    segments: &[&[i32]],
    weight: &[R],
    (out, input): (usize, usize),
    layout: Layout,
    rows: impl Fn(&[i32]) -> Vec<R> + Sync,
) -> Vec<Vec<R>> {
    segments
        .par_iter()
        .enumerate()
        .map(|(expert, pairs)| {
            if pairs.is_empty() {
                return Vec::new();
            }
            let weight = &weight[expert * out * input..(expert + 1) * out * input];
            // x W^T for W stored [out, in], x W for W stored [in, out].
            let weight = match layout {
                Layout::OutIn => Matrix::new(weight, out, input).transposed_if(true),
                Layout::InOut => Matrix::new(weight, input, out),
            };
            let rows = rows(pairs);
            let mut product = vec![R::zero(); pairs.len() * out];
            gemm(
                &mut product,
                Matrix::new(&rows, pairs.len(), input),
                weight,
                R::one(),
                false,
                false,
            );
            product
        })
        .collect()
}
