//! The leading right singular vectors of tall and wide stacks of matrices.
//!
//! They are the eigenvectors of the stack's smaller Gram matrix. Squaring the singular values costs half of the digits of the small ones: in
//! 64 bits what is lost lies below 1e-8 of the largest, which is less than the rounding of 32-bit weights.
//!
//! Everything here runs on the calling thread, so that results do not depend on how many threads there are.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::traits::RealField;
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par};

use crate::convert::gaussian::Gaussian;
use crate::convert::latent::SvdMethod;
use crate::error::{Error, Result};
use crate::ops::Real;

/// What singular vectors are computed in.
pub(crate) trait Float: Real + RealField {}

impl Float for f32 {}
impl Float for f64 {}

/// `a b`.
pub(crate) fn product<T: Float>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut out, Accum::Replace, a, b, T::of(1.0), Par::Seq);
    out
}

/// `out - a b` in place of `out`.
pub(crate) fn subtract_product<T: Float>(out: MatMut<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    matmul(out, Accum::Add, a, b, T::of(-1.0), Par::Seq);
}

/// The sum of squares, in 64 bits whatever the elements are.
pub(crate) fn squared_norm<T: Float>(matrix: MatRef<'_, T>) -> f64 {
    (0..matrix.ncols())
        .map(|column| {
            (0..matrix.nrows())
                .map(|row| matrix[(row, column)].f64().powi(2))
                .sum::<f64>()
        })
        .sum()
}

/// Adds `a^T a` to the lower triangle of `gram`.
fn add_gram<T: Float>(gram: &mut Mat<T>, a: MatRef<'_, T>) {
    triangular::matmul(
        gram,
        BlockStructure::TriangularLower,
        Accum::Add,
        a.transpose(),
        BlockStructure::Rectangular,
        a,
        BlockStructure::Rectangular,
        T::of(1.0),
        Par::Seq,
    );
}

/// An orthonormal basis of the columns, as many as there are; those that depend on others are completed to one.
pub(crate) fn orthonormal_columns<T: Float>(mut matrix: Mat<T>) -> Mat<T> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let block = recommended_block_size::<T>(rows, columns);
    let mut coefficients = Mat::zeros(block, rows.min(columns));
    let scratch =
        qr_in_place_scratch::<T>(rows, columns, block, Par::Seq, faer::prelude::default());
    qr_in_place(
        matrix.as_mut(),
        coefficients.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        faer::prelude::default(),
    );
    let mut basis = Mat::identity(rows, columns);
    let scratch =
        apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(rows, block, columns);
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        matrix.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        basis.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    basis
}

/// Eigenvectors of a symmetric positive semi-definite matrix for its largest eigenvalues, as columns, largest first.
struct Eigen<T> {
    vectors: Mat<T>,
    values: Vec<f64>,
}

/// Of the matrix whose lower triangle is in `gram`.
fn all_eigenvectors<T: Float>(gram: MatRef<'_, T>, count: usize) -> Result<Eigen<T>> {
    let size = gram.nrows();
    let mut vectors = Mat::zeros(size, size);
    let mut values = Diag::zeros(size);
    let scratch = self_adjoint_evd_scratch::<T>(
        size,
        ComputeEigenvectors::Yes,
        Par::Seq,
        faer::prelude::default(),
    );
    self_adjoint_evd(
        gram,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        faer::prelude::default(),
    )
    .map_err(|error| {
        Error::shape(
            "singular vectors",
            format!("the eigenvalues of a {size} x {size} Gram matrix: {error:?}"),
        )
    })?;
    // They come in ascending order.
    Ok(Eigen {
        vectors: Mat::from_fn(size, count, |row, column| vectors[(row, size - 1 - column)]),
        values: (0..count)
            .map(|column| values[size - 1 - column].f64().max(0.0))
            .collect(),
    })
}

fn mirror_lower<T: Float>(gram: &mut Mat<T>) {
    for column in 0..gram.ncols() {
        for row in 0..column {
            gram[(row, column)] = gram[(column, row)];
        }
    }
}

/// Subspace iteration from random directions (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4), on the Gram matrix: a
/// multiplication by it is a whole power iteration of the stack.
fn random_eigenvectors<T: Float>(
    mut gram: Mat<T>,
    count: usize,
    width: usize,
    power_iterations: usize,
    seed: u64,
) -> Result<Eigen<T>> {
    mirror_lower(&mut gram);
    let mut gaussian = Gaussian::new(seed);
    let mut basis = Mat::from_fn(gram.nrows(), width, |_, _| T::of(gaussian.next()));
    for _ in 0..=power_iterations {
        basis = orthonormal_columns(product(gram.as_ref(), basis.as_ref()));
    }
    let image = product(gram.as_ref(), basis.as_ref());
    let inside = product(basis.transpose(), image.as_ref());
    let eigen = all_eigenvectors(inside.as_ref(), count)?;
    Ok(Eigen {
        vectors: product(basis.as_ref(), eigen.vectors.as_ref()),
        values: eigen.values,
    })
}

fn eigenvectors<T: Float>(gram: Mat<T>, count: usize, method: SvdMethod) -> Result<Eigen<T>> {
    match method {
        SvdMethod::Randomized {
            oversampling,
            power_iterations,
            seed,
        } if count.saturating_add(oversampling) < gram.nrows() => {
            random_eigenvectors(gram, count, count + oversampling, power_iterations, seed)
        }
        SvdMethod::Exact | SvdMethod::Randomized { .. } => all_eigenvectors(gram.as_ref(), count),
    }
}

fn trace<T: Float>(gram: &Mat<T>) -> f64 {
    (0..gram.nrows()).map(|row| gram[(row, row)].f64()).sum()
}

/// The leading right singular vectors of a stack.
pub(crate) struct RowSpace<T> {
    /// As columns, orthonormal, those of the largest singular values first.
    pub(crate) basis: Mat<T>,
    /// The part of the sum of squares of the stack that lies in their span.
    pub(crate) kept_energy: f64,
}

/// The `count` leading right singular vectors of a stack of blocks that have `rows` rows together and `columns` columns each. One block is in
/// memory at a time if the stack is tall.
pub(crate) fn leading_row_space<T: Float>(
    blocks: impl Iterator<Item = Result<Mat<T>>>,
    rows: usize,
    columns: usize,
    count: usize,
    method: SvdMethod,
) -> Result<RowSpace<T>> {
    let kept = |values: &[f64], total: f64| {
        if total > 0.0 {
            (values.iter().sum::<f64>() / total).min(1.0)
        } else {
            1.0
        }
    };
    if rows >= columns {
        let mut gram = Mat::zeros(columns, columns);
        for block in blocks {
            add_gram(&mut gram, block?.as_ref());
        }
        let total = trace(&gram);
        let eigen = eigenvectors(gram, count, method)?;
        return Ok(RowSpace {
            kept_energy: kept(&eigen.values, total),
            basis: eigen.vectors,
        });
    }
    // The transposed stack, column by column of memory.
    let mut stack = Mat::zeros(columns, rows);
    let mut start = 0;
    for block in blocks {
        let block = block?;
        let end = start + block.nrows();
        stack
            .as_mut()
            .subcols_mut(start, end - start)
            .copy_from(block.transpose());
        start = end;
    }
    let mut gram = Mat::zeros(rows, rows);
    add_gram(&mut gram, stack.as_ref());
    let total = trace(&gram);
    let eigen = eigenvectors(gram, count, method)?;
    // M^T U is V S: orthogonal already but for the small singular values, which QR sets right and, where they are 0, completes.
    let basis = orthonormal_columns(product(stack.as_ref(), eigen.vectors.as_ref()));
    Ok(RowSpace {
        basis,
        kept_energy: kept(&eigen.values, total),
    })
}

/// The `count` leading left singular vectors of one matrix, as columns.
pub(crate) fn leading_column_space<T: Float>(
    matrix: MatRef<'_, T>,
    count: usize,
    method: SvdMethod,
) -> Result<Mat<T>> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let transposed = matrix.transpose().to_owned();
    let blocks = std::iter::once(Ok(transposed));
    Ok(leading_row_space(blocks, columns, rows, count, method)?.basis)
}
