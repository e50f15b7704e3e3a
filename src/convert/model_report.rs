//! What a model's conversion has cost and won.

use serde::Serialize;

use crate::convert::LayerReport;
use crate::convert::plan::LayerRecord;

/// All layers together: their routed experts; routers and shared experts are as they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Parameters before.
    pub parameters_before: u64,
    /// Parameters after.
    pub parameters_after: u64,
    /// Floating-point operations for a token before, a multiply-add counting as 2.
    pub flops_before: u64,
    /// Operations after, if all sets of experts are chosen equally often.
    pub flops_after_expected: f64,
    /// Operations after, with the most groups that a token's experts can be in.
    pub flops_after_most: u64,
    /// `flops_after_expected` by `flops_before`, less 1: negative where the converted model costs less.
    pub expected_change: f64,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvertedLayer {
    /// Its path.
    pub path: String,
    /// What was done and lost.
    #[serde(flatten)]
    pub report: LayerReport,
}

/// What belongs to the run and not to the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RunFacts {
    /// Files of tensors that this run wrote.
    pub files_written: usize,
    /// Those that were there of runs that were ended.
    pub files_of_earlier_runs: usize,
    /// The most memory that the process had at once, what is mapped of files included, where the system says so.
    pub peak_memory_bytes: Option<u64>,
}

/// `conversion.json`, but for options and source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelReport {
    /// All layers together.
    pub totals: Totals,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// What of the source's folder was not copied: weights in other files, which are of the model as it was, and links to folders.
    pub not_copied: Vec<String>,
    /// The layers.
    pub layers: Vec<ConvertedLayer>,
    /// What belongs to the run and not to the result.
    pub run: RunFacts,
}

impl ModelReport {
    pub(crate) fn new(records: Vec<LayerRecord>, not_copied: Vec<String>, run: RunFacts) -> Self {
        let mut totals = Totals::default();
        let mut warnings = Vec::new();
        let mut layers = Vec::new();
        for LayerRecord { path, report } in records {
            totals.parameters_before += report.parameters.before;
            totals.parameters_after += report.parameters.after;
            if let Some(active) = &report.active {
                totals.flops_before += active.flops_before;
                totals.flops_after_expected += active.flops_after_expected;
                totals.flops_after_most += active.flops_after_most;
            }
            warnings.extend(
                report
                    .warnings
                    .iter()
                    .map(|warning| format!("{path}: {warning}")),
            );
            layers.push(ConvertedLayer { path, report });
        }
        if totals.flops_before > 0 {
            totals.expected_change = totals.flops_after_expected / totals.flops_before as f64 - 1.0;
        }
        if !not_copied.is_empty() {
            warnings.push(format!(
                "not copied (other weights are of the model as it was, links to folders are not followed): {}",
                not_copied.join(", ")
            ));
        }
        Self {
            totals,
            warnings,
            not_copied,
            layers,
            run,
        }
    }
}

/// The most memory that this process had at once, where the system tells (Linux).
pub(crate) fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
