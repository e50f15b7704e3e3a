//! An MoE into latent experts (MoLE, arXiv 2503.23100, section 4): a projection into a latent shared by each group of experts, and what is left of every
//! expert behind it.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatRef, Par};
use rayon::prelude::*;

use crate::convert::calibration::Calibration;
use crate::convert::grouping;
use crate::convert::latent_report::{
    LayerReport, Operator, OperatorReport, Parameters, PhaseErrors, RelativeError,
};
use crate::convert::stack::{Squares, Stacks};
use crate::convert::subspace::{
    Float, leading_column_space, leading_row_space, orthonormal_columns, product, subtract_product,
};
use crate::error::{Error, Result};
use crate::formats::{LatentDown, LatentExperts, MoeExperts};
use crate::tensor::Tensor;

/// How experts find their groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GroupBy {
    /// Consecutive experts.
    #[default]
    Id,
    /// By how much their row spaces overlap: the mean squared cosine of the principal angles between the leading right singular subspaces
    /// (of up to 64 dimensions) of two experts, added over the operators that are factored.
    Similarity,
}

/// What singular vectors are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SvdPrecision {
    /// 32 bits: about half of the time; singular values below 1e-3 of the largest are lost.
    F32,
    /// 64 bits.
    #[default]
    F64,
}

/// How singular vectors are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SvdMethod {
    /// All of them.
    #[default]
    Exact,
    /// The leading ones only, by iteration from random directions.
    Randomized {
        /// How many more directions are carried along.
        oversampling: usize,
        /// How often they are multiplied by the Gram matrix after the first time.
        power_iterations: usize,
        /// Of the random directions.
        seed: u64,
    },
}

/// How singular vectors are computed, and in what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SvdOptions {
    /// The numbers.
    pub precision: SvdPrecision,
    /// The algorithm.
    pub method: SvdMethod,
}

/// How an MoE becomes latent experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LatentOptions {
    /// G.
    pub groups: usize,
    /// The width l of the latents; usually the experts' intermediate width.
    pub latent: usize,
    /// Phase 1: every matrix is first cut down to this rank. It never lowers the error.
    pub rank: Option<usize>,
    /// The down projections go through a latent of the group too.
    pub factored_down: bool,
    /// Which experts share a group.
    pub group_by: GroupBy,
    /// How singular vectors are computed.
    pub svd: SvdOptions,
}

impl LatentOptions {
    /// So many groups and so wide a latent; no truncation, whole down projections, consecutive experts, exact singular vectors in 64 bits.
    #[must_use]
    pub fn new(groups: usize, latent: usize) -> Self {
        Self {
            groups,
            latent,
            rank: None,
            factored_down: false,
            group_by: GroupBy::Id,
            svd: SvdOptions::default(),
        }
    }

    /// Checks that the options fit a layer of so many experts, with intermediate and hidden widths.
    ///
    /// # Errors
    /// [`Error::Setting`] if the groups do not divide the experts, or the latent width or the rank is 0 or more than a group's, or an
    /// expert's, matrices can have.
    pub fn check(&self, [experts, intermediate, hidden]: [usize; 3]) -> Result<()> {
        if self.groups == 0 || !experts.is_multiple_of(self.groups) {
            return Err(Error::setting(
                "groups",
                self.groups,
                format!("must divide the {experts} experts into groups of one size"),
            ));
        }
        let limit = intermediate.min(hidden);
        if let Some(rank) = self.rank
            && (rank == 0 || rank > limit)
        {
            return Err(Error::setting(
                "rank",
                rank,
                format!(
                    "must be between 1 and {limit}: an expert's matrices are {intermediate} x {hidden}"
                ),
            ));
        }
        let each = self.rank.unwrap_or(intermediate);
        let rows = experts / self.groups * each;
        let limit = rows.min(hidden);
        if self.latent == 0 || self.latent > limit {
            return Err(Error::setting(
                "latent",
                self.latent,
                format!(
                    "must be between 1 and {limit}: a group's {} experts of rank {each} at most have {rows} rows together, of {hidden} columns",
                    experts / self.groups
                ),
            ));
        }
        Ok(())
    }
}

/// Turns the experts of a layer into latent experts.
///
/// For each group and each of gate and up, and of the transposed down projections with `factored_down`: the matrices W~_i of the group's
/// experts (with a rank, their best approximations of that rank) are stacked, B is the stack's l leading right singular vectors, and A_i is
/// W_i B^T, refit to the original matrix. That is exact where the rank of the stack is at most l; else the squared error is the sum of the squared singular values beyond l.
///
/// With a calibration it is the error on the calibration's tokens that is smallest: the stack is multiplied by L of C = E\[x x^T\] = L L^T, B spans the rows of
/// V^T L^-1, and A_i = W_i C B^T (B C B^T)^-1. For factored down projections what counts is E\[h h^T\] of what each expert has inside, for all of
/// the tokens.
///
/// Groups and operators are spread over rayon's threads, and the result does not depend on how many there are. Memory: the layer before and after, and for each
/// thread three to four square matrices of the hidden width (or of a stack's rows, if these are fewer).
///
/// # Errors
/// [`Error::Setting`] as [`LatentOptions::check`], [`Error::Shape`] if matrices or calibration do not fit each other, [`Error::NotFinite`] if a weight is NaN or infinite.
pub fn convert_layer(
    experts: &MoeExperts,
    calibration: Option<&Calibration>,
    options: &LatentOptions,
) -> Result<(LatentExperts, LayerReport)> {
    match options.svd.precision {
        SvdPrecision::F32 => convert::<f32>(experts, calibration, options),
        SvdPrecision::F64 => convert::<f64>(experts, calibration, options),
    }
}

fn convert<T: Float>(
    experts: &MoeExperts,
    calibration: Option<&Calibration>,
    options: &LatentOptions,
) -> Result<(LatentExperts, LayerReport)> {
    let extents @ [e, m, n] = experts.extents()?;
    options.check(extents)?;
    let (g, l) = (options.groups, options.latent);
    let stacks = Stacks::<T>::new(experts, calibration, [m, n])?;
    let mut operators = vec![Operator::Gate, Operator::Up];
    if options.factored_down {
        operators.push(Operator::Down);
    }
    let expert_to_group = match options.group_by {
        GroupBy::Id => grouping::consecutive(e, g),
        GroupBy::Similarity => {
            let similarity = grouping::similarity(&stacks, e, &operators, options)?;
            grouping::balanced_groups(similarity.as_ref(), g)
        }
    };

    // Every task writes into the memory that the result has.
    let mut memory: Vec<[Vec<f32>; 2]> = operators
        .iter()
        .map(|_| [vec![0.0; g * l * n], vec![0.0; e * m * l]])
        .collect();
    let mut tasks = Vec::with_capacity(g * operators.len());
    for (&operator, [shared, own]) in operators.iter().zip(&mut memory) {
        let mut groups: Vec<Vec<(usize, &mut [f32])>> = (0..g).map(|_| Vec::new()).collect();
        for (expert, part) in own.chunks_mut(m * l).enumerate() {
            groups[expert_to_group[expert]].push((expert, part));
        }
        for (group, (members, shared)) in
            groups.into_iter().zip(shared.chunks_mut(l * n)).enumerate()
        {
            tasks.push(Task {
                group,
                operator,
                shared,
                members,
            });
        }
    }
    let factored = tasks
        .into_par_iter()
        .map(|task| task.run(&stacks, options))
        .collect::<Result<Vec<_>>>()?;

    let parameters = {
        let [e, m, n, g, l] = [e, m, n, g, l].map(|x| x as u64);
        let shared = operators.len() as u64;
        Parameters {
            before: 3 * e * m * n,
            after: (3 - shared) * e * m * n + shared * (e * m * l + g * l * n),
        }
    };
    let mut total = PhaseSquares::default();
    for (_, squares) in &factored {
        total.add(squares);
    }
    let operators: Vec<OperatorReport> = factored.into_iter().map(|(report, _)| report).collect();
    let mut report = LayerReport {
        experts: e,
        intermediate: m,
        hidden: n,
        groups: g,
        latent: l,
        rank: options.rank,
        factored_down: options.factored_down,
        expert_to_group: expert_to_group.clone(),
        calibration_tokens: calibration.map(Calibration::tokens),
        errors: total.errors(),
        kept_energy: operators
            .iter()
            .map(|operator| operator.kept_energy)
            .sum::<f64>()
            / operators.len() as f64,
        operators,
        parameters,
        active: None,
        warnings: Vec::new(),
    };
    report.warn_of_parameters();

    let mut memory = memory.into_iter();
    let mut next = |shared: [usize; 3], own: [usize; 3]| {
        let [first, second] = memory.next().unwrap_or_default();
        Ok::<_, Error>((Tensor::f32(shared, first)?, Tensor::f32(own, second)?))
    };
    let (gate_latent, gate_expert) = next([g, l, n], [e, m, l])?;
    let (up_latent, up_expert) = next([g, l, n], [e, m, l])?;
    let down = if options.factored_down {
        let (latent, expert) = next([g, n, l], [e, l, m])?;
        LatentDown::Factored { latent, expert }
    } else {
        LatentDown::Whole(experts.down.clone())
    };
    let latent = LatentExperts {
        gate_latent,
        up_latent,
        gate_expert,
        up_expert,
        down,
        expert_to_group,
    };
    Ok((latent, report))
}

/// One operator of one group, and where its factors go.
struct Task<'a> {
    group: usize,
    operator: Operator,
    /// B, `[l, n]`; Bd, `[n, l]`.
    shared: &'a mut [f32],
    /// A, `[m, l]`, of each expert; Ad, `[l, m]`.
    members: Vec<(usize, &'a mut [f32])>,
}

impl Task<'_> {
    fn run<T: Float>(
        self,
        stacks: &Stacks<'_, T>,
        options: &LatentOptions,
    ) -> Result<(OperatorReport, PhaseSquares)> {
        let Self {
            group,
            operator,
            shared,
            members,
        } = self;
        let [m, n] = stacks.extents;
        let l = options.latent;
        let method = options.svd.method;

        // Phase 1. The left singular vectors stand for the truncated matrix: U U^T X and U^T X have the same right singular vectors.
        let mut lefts = Vec::new();
        if let Some(rank) = options.rank {
            for (expert, _) in &members {
                let rows = stacks.rows(operator, *expert);
                lefts.push(leading_column_space(rows.as_ref(), rank, method)?);
            }
        }
        // Phase 2.
        let blocks = members.iter().enumerate().map(|(member, (expert, _))| {
            let rows = stacks.rows(operator, *expert);
            Ok(match lefts.get(member) {
                Some(left) => product(left.transpose(), rows.as_ref()),
                None => rows,
            })
        });
        let rows = members.len() * options.rank.unwrap_or(m);
        let space = leading_row_space(blocks, rows, n, l, method)?;
        let kept_energy = space.kept_energy;
        let (basis, refit) = match stacks.input_lower(operator) {
            None => (space.basis, None),
            Some(lower) => {
                let (basis, refit) = unweighted(space.basis, lower);
                (basis, Some(refit))
            }
        };
        let refit = refit.as_ref().unwrap_or(&basis);

        let basis_f32: Mat<f32> =
            Mat::from_fn(n, l, |row, column| basis[(row, column)].f64() as f32);
        for row in 0..n {
            for column in 0..l {
                let at = if operator == Operator::Down {
                    row * l + column
                } else {
                    column * n + row
                };
                shared[at] = basis_f32[(row, column)];
            }
        }
        let mut squares = PhaseSquares::default();
        for (member, (expert, own)) in members.into_iter().enumerate() {
            let original = stacks.matrix::<T>(operator, expert);
            let factor = rounded(product(original.as_ref(), refit.as_ref()).as_ref());
            for row in 0..m {
                for column in 0..l {
                    let at = if operator == Operator::Down {
                        column * m + row
                    } else {
                        row * l + column
                    };
                    own[at] = factor[(row, column)];
                }
            }
            let measure = stacks.measure(operator, expert);
            let source = rounded(original.as_ref());
            let squared = |matrix: &Mat<f32>| stacks.squares(operator, &measure, matrix.as_ref());
            let less = |matrix: &Mat<f32>, factor: &Mat<f32>| {
                let mut difference = matrix.clone();
                subtract_product(difference.as_mut(), factor.as_ref(), basis_f32.transpose());
                squared(&difference)
            };
            let source_squares = squared(&source);
            let whole = less(&source, &factor);
            squares.source += source_squares;
            squares.whole += whole;
            if let Some(left) = lefts.get(member) {
                let truncated = stacks.truncated(operator, expert, left.as_ref());
                let unfit = rounded(product(truncated.as_ref(), refit.as_ref()).as_ref());
                squares.rank += squared(&rounded((&original - &truncated).as_ref()));
                let truncated = rounded(truncated.as_ref());
                squares.truncated += squared(&truncated);
                squares.factorisation += less(&truncated, &unfit);
                squares.without_refit += less(&source, &unfit);
            } else {
                squares.truncated += source_squares;
                squares.factorisation += whole;
                squares.without_refit += whole;
            }
        }
        let report = OperatorReport {
            group,
            operator,
            kept_energy,
            errors: squares.errors(),
        };
        Ok((report, squares))
    }
}

/// Of the leading right singular vectors V of M L: orthonormal rows B (as columns) that span those of V^T L^-1, and C B^T (B C B^T)^-1.
///
/// With L^-T V = B^T R, the second is L V R^T: B C B^T is (R R^T)^-1, so that nothing needs to be inverted.
fn unweighted<T: Float>(vectors: Mat<T>, lower: MatRef<'_, T>) -> (Mat<T>, Mat<T>) {
    let mut solved = vectors.clone();
    solve_upper_triangular_in_place(lower.transpose(), solved.as_mut(), Par::Seq);
    let basis = orthonormal_columns(solved.clone());
    let upper = product(basis.transpose(), solved.as_ref());
    let refit = product(vectors.as_ref(), upper.transpose());
    (basis, product(lower, refit.as_ref()))
}

fn rounded<T: Float>(matrix: MatRef<'_, T>) -> Mat<f32> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| {
        matrix[(row, column)].f64() as f32
    })
}

/// Sums of squares over experts: what the errors of the phases are made of.
#[derive(Clone, Copy, Debug, Default)]
struct PhaseSquares {
    source: Squares,
    truncated: Squares,
    rank: Squares,
    factorisation: Squares,
    without_refit: Squares,
    whole: Squares,
}

impl PhaseSquares {
    fn add(&mut self, other: &Self) {
        self.source += other.source;
        self.truncated += other.truncated;
        self.rank += other.rank;
        self.factorisation += other.factorisation;
        self.without_refit += other.without_refit;
        self.whole += other.whole;
    }

    fn errors(&self) -> PhaseErrors {
        PhaseErrors {
            rank: relative(self.rank, self.source),
            factorisation: relative(self.factorisation, self.truncated),
            without_refit: relative(self.without_refit, self.source),
            whole: relative(self.whole, self.source),
        }
    }
}

fn relative(difference: Squares, of: Squares) -> RelativeError {
    let ratio = |difference: f64, of: f64| {
        if of > 0.0 {
            (difference / of).sqrt()
        } else {
            0.0
        }
    };
    RelativeError {
        unweighted: ratio(difference.unweighted, of.unweighted),
        weighted: of
            .weighted
            .map(|weighted| ratio(difference.weighted.unwrap_or(0.0), weighted)),
    }
}
