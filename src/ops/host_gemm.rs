//! Matrix products on the CPU, by the `gemm` crate.

use crate::ops::Real;

/// A matrix in a slice, element (i, j) at `i * row_step + j * column_step`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a, R> {
    pub(crate) data: &'a [R],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_step: usize,
    pub(crate) column_step: usize,
}

impl<'a, R> Matrix<'a, R> {
    /// Row-major, without gaps.
    pub(crate) fn new(data: &'a [R], rows: usize, columns: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            row_step: columns,
            column_step: 1,
        }
    }

    /// The same elements with rows and columns swapped, if `transpose`.
    pub(crate) fn transposed_if(self, transpose: bool) -> Self {
        if !transpose {
            return self;
        }
        Self {
            rows: self.columns,
            columns: self.rows,
            row_step: self.column_step,
            column_step: self.row_step,
            ..self
        }
    }

    fn fits(&self) -> bool {
        let last =
            (self.rows.max(1) - 1) * self.row_step + (self.columns.max(1) - 1) * self.column_step;
        self.rows == 0 || self.columns == 0 || last < self.data.len()
    }
}

/// `out = alpha a b`, plus what is in `out` before if `accumulate`; `out` is row-major `[a.rows, b.columns]`.
pub(crate) fn gemm<R: Real>(
    out: &mut [R],
    a: Matrix<'_, R>,
    b: Matrix<'_, R>,
    alpha: R,
    accumulate: bool,
    parallel: bool,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(
        k == b.rows && out.len() >= m * n && a.fits() && b.fits(),
        "the operands of a host matrix product do not fit"
    );
    let parallelism = if parallel {
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    #[expect(unsafe_code, reason = "the gemm crate takes raw pointers")]
    // SAFETY: the assertion above shows that every element addressed lies in its slice; `out` is borrowed mutably, so
    // it does not overlap the operands.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_step as isize,
            a.row_step as isize,
            b.data.as_ptr(),
            b.column_step as isize,
            b.row_step as isize,
            R::one(),
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
