//! What a conversion into latent experts cost: energy, errors, parameters, operations.

use serde::{Deserialize, Serialize};

/// One of the three projections of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operator {
    /// Wg.
    Gate,
    /// Wu.
    Up,
    /// Wd.
    Down,
}

/// The norm of a difference by the norm of what it is to be compared with; 0 where both are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RelativeError {
    /// Of the matrices, by Frobenius' norm.
    pub unweighted: f64,
    /// Of what the matrices make of the calibration's tokens: the root of E\[|ΔW x|²\] by that of E\[|W x|²\]. A millionth of their mean diagonal is added to the
    /// diagonal of the second moments (see [`Calibration`](crate::convert::Calibration)), so that directions of no token count a little. `None` without calibration.
    pub weighted: Option<f64>,
}

/// The errors of the phases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseErrors {
    /// Of the truncation to a rank, against the source; 0 without.
    pub rank: RelativeError,
    /// Of the shared factor, against the truncated matrices.
    pub factorisation: RelativeError,
    /// Against the source, had the experts' factors been left as they follow from the truncated matrices; without truncation the same as
    /// `whole`.
    pub without_refit: RelativeError,
    /// What was written against the source.
    pub whole: RelativeError,
}

/// One operator of one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorReport {
    /// The group.
    pub group: usize,
    /// The operator.
    pub operator: Operator,
    /// The part of the squared singular values of the stack that the latent width keeps; with calibration of the weighted stack.
    pub kept_energy: f64,
    /// The errors.
    pub errors: PhaseErrors,
}

/// Parameters of the routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// 3 E m n.
    pub before: u64,
    /// E m n + 2 E m l + 2 G l n; with factored down projections 3 E m l + 3 G l n.
    pub after: u64,
}

/// Floating-point operations of the routed experts for a token, a multiply-add counting as 2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActiveCost {
    /// How many experts a token takes, k.
    pub top_k: usize,
    /// 6 k m n.
    pub flops_before: u64,
    /// With the fewest groups that k experts can be in.
    pub flops_after_least: u64,
    /// With as many groups as k experts chosen evenly at random are in on average.
    pub flops_after_expected: f64,
    /// With the most groups that k experts can be in.
    pub flops_after_most: u64,
    /// That average number of groups.
    pub expected_active_groups: f64,
    /// `flops_after_expected` by `flops_before`, less 1: negative where the converted layer costs less.
    pub expected_change: f64,
}

/// What the conversion of one layer did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// E.
    pub experts: usize,
    /// m.
    pub intermediate: usize,
    /// n.
    pub hidden: usize,
    /// G.
    pub groups: usize,
    /// l.
    pub latent: usize,
    /// The rank of the first phase.
    pub rank: Option<usize>,
    /// Whether the down projections were factored.
    pub factored_down: bool,
    /// The group of each expert.
    pub expert_to_group: Vec<usize>,
    /// Tokens of the calibration.
    pub calibration_tokens: Option<usize>,
    /// Every group and operator that was factored.
    pub operators: Vec<OperatorReport>,
    /// All of them together.
    pub errors: PhaseErrors,
    /// The mean of their kept energies.
    pub kept_energy: f64,
    /// Parameters of the experts.
    pub parameters: Parameters,
    /// Operations for a token, once it is known how many experts a token takes: see [`LayerReport::with_top_k`].
    pub active: Option<ActiveCost>,
    /// Where the converted layer costs more than the source.
    pub warnings: Vec<String>,
}

impl LayerReport {
    /// The same report with the operations for a token that takes `top_k` experts, and a warning if they become more.
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        let top_k = top_k.clamp(1, self.experts.max(1));
        let size = self.experts / self.groups.max(1);
        let expected_active_groups = expected_groups(self.experts, self.groups, top_k);
        let before = 6 * [top_k, self.intermediate, self.hidden]
            .into_iter()
            .product::<usize>() as u64;
        let least = top_k.div_ceil(size.max(1));
        let expected = self.flops_after(top_k, expected_active_groups);
        let active = ActiveCost {
            top_k,
            flops_before: before,
            flops_after_least: self.flops_after(top_k, least as f64) as u64,
            flops_after_expected: expected,
            flops_after_most: self.flops_after(top_k, top_k.min(self.groups) as f64) as u64,
            expected_active_groups,
            expected_change: expected / before as f64 - 1.0,
        };
        if active.expected_change > 0.0 {
            self.warnings.push(format!(
                "a token costs {:.1} % more operations than before: its {top_k} experts are in {expected_active_groups:.2} groups of \
                 {size} on average, and every group computes latents of width {}",
                100.0 * active.expected_change,
                self.latent
            ));
        }
        self.active = Some(active);
        self
    }

    /// 2 k m n + 4 k m l + 4 `active_groups` l n; with factored down projections 6 k m l + 6 `active_groups` l n.
    fn flops_after(&self, top_k: usize, active_groups: f64) -> f64 {
        let [k, m, n, l] = [top_k, self.intermediate, self.hidden, self.latent].map(|x| x as f64);
        let down = if self.factored_down {
            2.0 * k * m * l + 2.0 * active_groups * l * n
        } else {
            2.0 * k * m * n
        };
        down + 4.0 * k * m * l + 4.0 * active_groups * l * n
    }

    pub(crate) fn warn_of_parameters(&mut self) {
        let Parameters { before, after } = self.parameters;
        if after > before {
            self.warnings.push(format!(
                "the experts have {after} parameters, {:.1} % more than the {before} before: {} groups of latents of width {} are too many \
                 or too wide",
                100.0 * (after as f64 / before as f64 - 1.0),
                self.groups,
                self.latent
            ));
        }
    }
}

/// In how many groups of equal size `top_k` experts are on average that are chosen evenly at random:
/// G (1 - C(E - E/G, k) / C(E, k)).
fn expected_groups(experts: usize, groups: usize, top_k: usize) -> f64 {
    let size = experts / groups.max(1);
    let missed: f64 = (0..top_k)
        .map(|chosen| {
            let left = (experts - chosen) as f64;
            (left - size as f64).max(0.0) / left
        })
        .product();
    groups as f64 * (1.0 - missed)
}
