//! What inputs a layer sees: the second moments that errors are weighted by.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};

use crate::convert::subspace::{Float, product};
use crate::error::{Error, Result};
use crate::ops::Activation;
use crate::tensor::Tensor;

/// What is added to the diagonal of second moments, as a part of its mean.
const JITTER: f64 = 1e-6;

/// The inputs of a layer for some tokens, and their second moments C = E\[x x^T\] = L L^T.
///
/// A millionth of C's mean diagonal is added to its diagonal. Fewer tokens than hidden numbers, or a number that is always 0, make C singular:
/// L then has no inverse, and what an input of a direction that no token had becomes would be arbitrary. With the addition such directions
/// count, by so little that they take only the width that nothing else needs.
#[derive(Clone, Debug)]
pub struct Calibration {
    tokens: usize,
    hidden: usize,
    activations: Vec<f32>,
    lower: Mat<f64>,
    activation: Activation,
}

impl Calibration {
    /// From the inputs of the layer, `[tokens, hidden]`: what comes out of the norm before it. The experts are taken to be SwiGLU.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not a matrix of floats, [`Error::NotFinite`] if it holds a NaN or an infinity, [`Error::Setting`] if all of
    /// it is 0.
    pub fn from_activations(activations: &Tensor) -> Result<Self> {
        let [tokens, hidden] =
            <[usize; 2]>::try_from(activations.shape().dims()).map_err(|_| {
                Error::shape(
                    "calibration",
                    format!(
                        "{:?}: [tokens, hidden] is expected",
                        activations.shape().dims()
                    ),
                )
            })?;
        if let Some(element) = activations.first_not_finite() {
            return Err(Error::NotFinite {
                value: "the calibration's activations".into(),
                element,
            });
        }
        let activations = activations.to_f32();
        let rows = MatRef::from_row_major_slice(&activations, tokens, hidden);
        let lower = lower_of_moments(rows, JITTER).ok_or_else(|| {
            Error::setting(
                "calibration",
                format!("{tokens} tokens of {hidden} numbers"),
                "their second moments have no Cholesky factor: are they all 0?",
            )
        })?;
        Ok(Self {
            tokens,
            hidden,
            activations,
            lower,
            activation: Activation::Silu,
        })
    }

    /// The same tokens for experts of another activation. It matters to factored down projections only, which see what the experts have
    /// inside.
    #[must_use]
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// How many tokens there are.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The hidden width.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// L, with C = L L^T.
    pub(crate) fn lower<T: Float>(&self) -> Mat<T> {
        Mat::from_fn(self.hidden, self.hidden, |row, column| {
            T::of(self.lower[(row, column)])
        })
    }

    /// The lower Cholesky factor of the second moments that an expert with these matrices (`[m, n]`) has inside; of the identity where it
    /// has nothing but zeros.
    pub(crate) fn lower_inside<T: Float>(
        &self,
        gate: MatRef<'_, f32>,
        up: MatRef<'_, f32>,
    ) -> Mat<T> {
        let tokens = MatRef::from_row_major_slice(&self.activations, self.tokens, self.hidden);
        let gate = product(tokens, gate.transpose());
        let mut inside = product(tokens, up.transpose());
        for column in 0..inside.ncols() {
            for row in 0..inside.nrows() {
                inside[(row, column)] *= self.activation.value(gate[(row, column)]);
            }
        }
        let width = inside.ncols();
        lower_of_moments(inside.as_ref(), JITTER).map_or_else(
            || Mat::identity(width, width),
            |lower| Mat::from_fn(width, width, |row, column| T::of(lower[(row, column)])),
        )
    }
}

/// The Cholesky factor of `rows^T rows / number of rows`, with `jitter` times the mean of its diagonal added to it; `None` if there is none.
pub(crate) fn lower_of_moments(rows: MatRef<'_, f32>, jitter: f64) -> Option<Mat<f64>> {
    let width = rows.ncols();
    let rows = Mat::from_fn(rows.nrows(), width, |row, column| {
        f64::from(rows[(row, column)])
    });
    let mut moments = Mat::zeros(width, width);
    triangular::matmul(
        &mut moments,
        BlockStructure::TriangularLower,
        Accum::Replace,
        rows.transpose(),
        BlockStructure::Rectangular,
        &rows,
        BlockStructure::Rectangular,
        1.0 / rows.nrows() as f64,
        Par::Seq,
    );
    let mean = (0..width).map(|i| moments[(i, i)]).sum::<f64>() / width as f64;
    if !(mean.is_normal() && mean > 0.0) {
        return None;
    }
    for i in 0..width {
        moments[(i, i)] += jitter * mean;
    }
    let scratch = cholesky_in_place_scratch::<f64>(width, Par::Seq, faer::prelude::default());
    cholesky_in_place(
        moments.as_mut(),
        LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        faer::prelude::default(),
    )
    .ok()?;
    for column in 1..width {
        for row in 0..column {
            moments[(row, column)] = 0.0;
        }
    }
    Some(moments)
}
