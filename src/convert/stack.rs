//! The matrices that a conversion stacks: plain, and weighted by what the layer sees.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatRef, Par};

use crate::convert::calibration::Calibration;
use crate::convert::latent_report::Operator;
use crate::convert::subspace::{Float, product, squared_norm};
use crate::error::{Error, Result};
use crate::formats::MoeExperts;
use crate::tensor::{Tensor, TensorData};

/// The experts of a layer as matrices whose columns are hidden numbers: Wg and Wu, `[m, n]`, and Wd^T, `[m, n]`.
pub(crate) struct Stacks<'a, T> {
    experts: &'a MoeExperts,
    calibration: Option<Weighting<'a, T>>,
    /// m and n.
    pub(crate) extents: [usize; 2],
    /// A power of two that brings the largest weight near 1, so that no square overflows.
    scale: f64,
}

struct Weighting<'a, T> {
    calibration: &'a Calibration,
    /// L of the layer's input, in the type that singular vectors are computed in, and in that errors are.
    lower: Mat<T>,
    lower_f32: Mat<f32>,
}

/// What turns the matrix of an expert into its weighted form.
enum Weight<T> {
    Nothing,
    /// W L.
    Input,
    /// L_i^T Wd_i^T, with the second moments L_i L_i^T of what the expert has inside.
    Inside(Mat<T>),
}

impl<'a, T: Float> Stacks<'a, T> {
    /// # Errors
    /// [`Error::Shape`] if the calibration is for another width, [`Error::NotFinite`] if a weight is not finite.
    pub(crate) fn new(
        experts: &'a MoeExperts,
        calibration: Option<&'a Calibration>,
        [intermediate, hidden]: [usize; 2],
    ) -> Result<Self> {
        if let Some(calibration) = calibration
            && calibration.hidden() != hidden
        {
            return Err(Error::shape(
                "calibration",
                format!(
                    "its tokens have {} numbers, the experts take {hidden}",
                    calibration.hidden()
                ),
            ));
        }
        let mut largest = 0.0_f64;
        for (name, tensor) in [
            ("gate", &experts.gate),
            ("up", &experts.up),
            ("down", &experts.down),
        ] {
            if let Some(element) = tensor.first_not_finite() {
                let size = intermediate * hidden;
                return Err(Error::NotFinite {
                    value: format!("the {name} projection of expert {}", element / size),
                    element: element % size,
                });
            }
            largest = largest.max(largest_magnitude(tensor)?);
        }
        let scale = if largest > 0.0 {
            2.0_f64.powi(-(largest.log2().floor() as i32).clamp(-1000, 1000))
        } else {
            1.0
        };
        Ok(Self {
            experts,
            calibration: calibration.map(|calibration| Weighting {
                calibration,
                lower: calibration.lower(),
                lower_f32: calibration.lower(),
            }),
            extents: [intermediate, hidden],
            scale,
        })
    }

    /// Wg, Wu or Wd^T of an expert, `[m, n]`.
    pub(crate) fn matrix<R: Float>(&self, operator: Operator, expert: usize) -> Mat<R> {
        let [m, n] = self.extents;
        let tensor = match operator {
            Operator::Gate => &self.experts.gate,
            Operator::Up => &self.experts.up,
            Operator::Down => &self.experts.down,
        };
        let range = expert * m * n..(expert + 1) * m * n;
        match tensor.data() {
            TensorData::F32(data) => converted(&data[range], operator, [m, n]),
            TensorData::F64(data) => converted(&data[range], operator, [m, n]),
            // Refused when the stacks were made.
            TensorData::I32(_) => Mat::zeros(m, n),
        }
    }

    /// The second moments are those of the input for gate and up, and those of the expert's inside for down.
    fn weight<R: Float>(&self, operator: Operator, expert: usize) -> Weight<R> {
        match (&self.calibration, operator) {
            (None, _) => Weight::Nothing,
            (Some(_), Operator::Gate | Operator::Up) => Weight::Input,
            (Some(weighting), Operator::Down) => {
                Weight::Inside(weighting.calibration.lower_inside(
                    self.matrix(Operator::Gate, expert).as_ref(),
                    self.matrix(Operator::Up, expert).as_ref(),
                ))
            }
        }
    }

    /// The rows that the shared space is sought for: the matrix of an expert, scaled and weighted; with a rank, only their part along its leading
    /// left singular vectors.
    pub(crate) fn rows(&self, operator: Operator, expert: usize) -> Mat<T> {
        let mut matrix = self.matrix::<T>(operator, expert);
        for column in matrix.col_iter_mut() {
            for element in column.iter_mut() {
                *element *= T::of(self.scale);
            }
        }
        match (self.weight(operator, expert), &self.calibration) {
            (Weight::Input, Some(weighting)) => product(matrix.as_ref(), weighting.lower.as_ref()),
            (Weight::Inside(lower), _) => product(lower.transpose(), matrix.as_ref()),
            _ => matrix,
        }
    }

    /// The matrix W~ of an expert, of the rank of `left`, orthonormal left singular vectors of [`Stacks::rows`].
    pub(crate) fn truncated(
        &self,
        operator: Operator,
        expert: usize,
        left: MatRef<'_, T>,
    ) -> Mat<T> {
        let matrix = self.matrix::<T>(operator, expert);
        let project = |rows: &Mat<T>| {
            let inside = product(left.transpose(), rows.as_ref());
            product(left, inside.as_ref())
        };
        match self.weight(operator, expert) {
            // U U^T W L L^-1.
            Weight::Nothing | Weight::Input => project(&matrix),
            Weight::Inside(lower) => {
                let rows: Mat<T> = product(lower.transpose(), matrix.as_ref());
                let mut truncated = project(&rows);
                solve_upper_triangular_in_place(lower.transpose(), truncated.as_mut(), Par::Seq);
                truncated
            }
        }
    }

    /// The sums of squares of a matrix in place of an expert's, plain and weighted.
    pub(crate) fn squares(
        &self,
        operator: Operator,
        measure: &Measure,
        matrix: MatRef<'_, f32>,
    ) -> Squares {
        let weighted = match (&measure.0, operator, &self.calibration) {
            (Weight::Input, _, Some(weighting)) => Some(squared_norm(
                product(matrix, weighting.lower_f32.as_ref()).as_ref(),
            )),
            (Weight::Inside(lower), ..) => {
                Some(squared_norm(product(lower.transpose(), matrix).as_ref()))
            }
            _ => None,
        };
        Squares {
            unweighted: squared_norm(matrix),
            weighted,
        }
    }

    /// What [`Stacks::squares`] weights an expert's errors by.
    pub(crate) fn measure(&self, operator: Operator, expert: usize) -> Measure {
        Measure(self.weight(operator, expert))
    }

    /// L of the layer's input, for operators that read it.
    pub(crate) fn input_lower(&self, operator: Operator) -> Option<MatRef<'_, T>> {
        match operator {
            Operator::Gate | Operator::Up => self
                .calibration
                .as_ref()
                .map(|weighting| weighting.lower.as_ref()),
            Operator::Down => None,
        }
    }
}

/// How an expert's errors are weighted.
pub(crate) struct Measure(Weight<f32>);

/// Sums of squares, plain and weighted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Squares {
    pub(crate) unweighted: f64,
    pub(crate) weighted: Option<f64>,
}

impl std::ops::AddAssign for Squares {
    fn add_assign(&mut self, other: Self) {
        self.unweighted += other.unweighted;
        if let Some(weighted) = other.weighted {
            *self.weighted.get_or_insert(0.0) += weighted;
        }
    }
}

fn converted<S: Float, R: Float>(data: &[S], operator: Operator, [m, n]: [usize; 2]) -> Mat<R> {
    match operator {
        Operator::Gate | Operator::Up => {
            Mat::from_fn(m, n, |row, column| R::of(data[row * n + column].f64()))
        }
        Operator::Down => Mat::from_fn(m, n, |row, column| R::of(data[column * m + row].f64())),
    }
}

fn largest_magnitude(tensor: &Tensor) -> Result<f64> {
    match tensor.data() {
        TensorData::F32(data) => Ok(f64::from(data.iter().fold(0.0_f32, |l, x| l.max(x.abs())))),
        TensorData::F64(data) => Ok(data.iter().fold(0.0_f64, |l, x| l.max(x.abs()))),
        TensorData::I32(_) => Err(Error::shape("experts", "their elements are integers")),
    }
}
