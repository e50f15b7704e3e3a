//! One layer's changes in common bases.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Accum, Mat, MatRef, Par};

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Singular values below this part of the largest count as 0. The matrices come from 32 bits and are computed with in 64: what is dependent is so to
/// some 1e-15.
const NOTHING: f64 = 1e-9;

/// `U S Vᵀ`: a change of a weight.
pub(super) struct Change {
    u: Mat<f64>,
    s: Vec<f64>,
    v: Mat<f64>,
}

/// All changes of a layer in common bases.
pub(super) struct Cores {
    /// `[rank, d_in]`, rows orthonormal.
    pub(super) a: Tensor,
    /// `[d_out, rank]`, columns orthonormal.
    pub(super) b: Tensor,
    /// `[experts, rank, rank]`.
    pub(super) core: Tensor,
    /// The numbers of independent directions in all A, and in all B.
    pub(super) independent: [usize; 2],
    /// The parts of the energy of all A, and of all B, that are inside the bases.
    pub(super) kept_energy: [f64; 2],
    /// `‖X - B Mᵀ A‖ / ‖X‖` of each change.
    pub(super) errors: Vec<f64>,
}

/// `one two`, in the same order of sums whatever the number of threads.
pub(super) fn product(one: MatRef<'_, f64>, two: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(one.nrows(), two.ncols());
    matmul(&mut result, Accum::Replace, one, two, 1.0, Par::Seq);
    result
}

/// A tensor's elements as a matrix of so many rows.
pub(super) fn matrix(elements: &[f64], rows: usize) -> Mat<f64> {
    let columns = elements.len() / rows.max(1);
    Mat::from_fn(rows, columns, |i, j| elements[i * columns + j])
}

/// The rounded elements of a matrix, row-major.
fn rounded(matrix: MatRef<'_, f64>) -> Vec<f32> {
    let rows = 0..matrix.nrows();
    rows.flat_map(|i| (0..matrix.ncols()).map(move |j| matrix[(i, j)] as f32))
        .collect()
}

/// The thin singular value decomposition, its values falling.
fn decompose(matrix: MatRef<'_, f64>) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let (m, n) = matrix.shape();
    let size = m.min(n);
    let (mut u, mut v) = (Mat::zeros(m, size), Mat::zeros(n, size));
    let mut s = Diag::zeros(size);
    let thin = ComputeSvdVectors::Thin;
    let scratch = svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Default::default());
    svd(
        matrix,
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| {
        let size = format!("[{m}, {n}]");
        Error::setting("matrix", size, "its singular values were not found")
    })?;
    let s = (0..size).map(|i| s.column_vector()[i]).collect();
    Ok((u, s, v))
}

/// The columns of `matrix`, each times a number.
fn scaled(matrix: MatRef<'_, f64>, numbers: &[f64]) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), numbers.len(), |i, j| {
        matrix[(i, j)] * numbers[j]
    })
}

impl Change {
    /// `scale b a`, for `a` `[rank, d_in]` and `b` `[d_out, rank]`.
    ///
    /// # Errors
    /// [`Error::Setting`] if singular values are not found.
    pub(super) fn new(a: MatRef<'_, f64>, b: MatRef<'_, f64>, scale: f64) -> Result<Self> {
        // A = P S Qᵀ, and B P S = U S' Wᵀ.
        let (p, s, q) = decompose(a)?;
        let s: Vec<f64> = s.iter().map(|s| s * scale).collect();
        let left = product(b, scaled(p.as_ref(), &s).as_ref());
        let (u, s, w) = decompose(left.as_ref())?;
        let v = product(q.as_ref(), w.as_ref());
        Ok(Self { u, s, v })
    }

    fn norm(&self) -> f64 {
        self.s.iter().map(|s| s * s).sum::<f64>().sqrt()
    }
}

/// The matrices beside each other.
fn beside(rows: usize, matrices: &[Mat<f64>]) -> Mat<f64> {
    let columns = matrices.iter().map(Mat::ncols).sum();
    let mut all = Mat::zeros(rows, columns);
    let mut start = 0;
    for matrix in matrices {
        let place = all.as_mut().subcols_mut(start, matrix.ncols());
        { place }.copy_from(matrix);
        start += matrix.ncols();
    }
    all
}

/// The directions of a stack of columns, by falling weight, and their weights.
fn directions(rows: usize, columns: &[Mat<f64>]) -> Result<(Mat<f64>, Vec<f64>)> {
    let (u, s, _) = decompose(beside(rows, columns).as_ref())?;
    Ok((u, s))
}

/// How many weights are not 0.
fn independent(weights: &[f64]) -> usize {
    let least = weights.first().map_or(0.0, |largest| largest * NOTHING);
    weights.iter().filter(|weight| **weight > least).count()
}

fn kept(weights: &[f64], width: usize) -> f64 {
    let energy = |weights: &[f64]| weights.iter().map(|w| w * w).sum::<f64>();
    let all = energy(weights);
    if all == 0.0 {
        1.0
    } else {
        energy(&weights[..width.min(weights.len())]) / all
    }
}

/// The first `width` columns; what is missing is 0.
fn basis(directions: &Mat<f64>, width: usize) -> Mat<f64> {
    Mat::from_fn(directions.nrows(), width, |i, j| {
        if j < directions.ncols() {
            directions[(i, j)]
        } else {
            0.0
        }
    })
}

/// Brings changes of a weight `[d_out, d_in]` into common bases of width `rank`, or as wide as loses nothing; an expert without a change has
/// a core of zeros. Bases are never wider than all changes have directions.
///
/// # Errors
/// [`Error::Setting`] if singular values are not found.
pub(super) fn cores(
    changes: &[Option<Change>],
    [d_in, d_out]: [usize; 2],
    rank: Option<usize>,
) -> Result<Cores> {
    let there = || changes.iter().flatten();
    let left: Vec<_> = there().map(|c| scaled(c.u.as_ref(), &c.s)).collect();
    let right: Vec<_> = there().map(|c| scaled(c.v.as_ref(), &c.s)).collect();
    let (u, u_weights) = directions(d_out, &left)?;
    let (v, v_weights) = directions(d_in, &right)?;
    let independent = [independent(&v_weights), independent(&u_weights)];
    let lossless = independent[0].max(independent[1]).max(1);
    let widest = u.ncols().max(v.ncols()).max(1);
    let rank = rank.unwrap_or(lossless).clamp(1, widest);
    let (u, v) = (basis(&u, rank), basis(&v, rank));
    let (a, b) = (rounded(v.transpose()), rounded(u.as_ref()));
    let mut core = Vec::new();
    let mut errors = Vec::new();
    // What is written has been rounded, and so is what the error is measured of.
    let wide = |narrow: &[f32]| narrow.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (a_written, b_written) = (matrix(&wide(&a), rank), matrix(&wide(&b), d_out));
    let a_gram = product(a_written.as_ref(), a_written.transpose());
    let b_gram = product(b_written.transpose(), b_written.as_ref());
    for change in changes {
        let Some(change) = change else {
            core.extend(std::iter::repeat_n(0.0_f32, rank * rank));
            errors.push(0.0);
            continue;
        };
        let us = scaled(change.u.as_ref(), &change.s);
        let inside_u = product(u.transpose(), us.as_ref());
        let inside_v = product(change.v.transpose(), v.as_ref());
        // A core acts transposed.
        let acting = product(inside_u.as_ref(), inside_v.as_ref());
        let written = rounded(acting.transpose());
        if let Some(element) = written.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                value: "a core in 32 bits".to_owned(),
                element,
            });
        }
        let acting = matrix(&wide(&written), rank).transpose().to_owned();
        // ‖X - Y‖² = ‖X‖² - 2 <X, Y> + ‖Y‖² for Y = B Mᵀ A, by way of matrices of the rank's size.
        let us_b = product(us.transpose(), b_written.as_ref());
        let a_v = product(a_written.as_ref(), change.v.as_ref());
        let through = product(
            product(us_b.as_ref(), acting.as_ref()).as_ref(),
            a_v.as_ref(),
        );
        let both: f64 = (0..through.nrows()).map(|i| through[(i, i)]).sum();
        let b_acting = product(b_gram.as_ref(), acting.as_ref());
        let acting_a = product(acting.as_ref(), a_gram.as_ref());
        let own: f64 = (0..rank)
            .flat_map(|i| (0..rank).map(move |j| (i, j)))
            .map(|at| b_acting[at] * acting_a[at])
            .sum();
        let norm = change.norm();
        let lost = (norm * norm - 2.0 * both + own).max(0.0).sqrt();
        errors.push(if norm == 0.0 { 0.0 } else { lost / norm });
        core.extend(written);
    }
    Ok(Cores {
        a: Tensor::f32([rank, d_in], a)?,
        b: Tensor::f32([d_out, rank], b)?,
        core: Tensor::f32([changes.len(), rank, rank], core)?,
        independent,
        kept_energy: [kept(&v_weights, rank), kept(&u_weights, rank)],
        errors,
    })
}
