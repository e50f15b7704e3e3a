//! `rankmix convert moe-to-latent`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use rankmix::convert::{
    GroupBy, LatentOptions, ModelOptions, ModelReport, Progress, SvdMethod, SvdPrecision,
    convert_model,
};
use rankmix::formats::Dtype;
use rankmix::{Error, Result};

use crate::convert::{Replacement, Written, bar};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Grouping {
    /// Neighbours in the order of the checkpoint.
    Id,
    /// Experts whose matrices read similar inputs.
    Similarity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Svd {
    /// All singular vectors.
    Exact,
    /// The leading ones only, from random directions: faster where the latent width is far below the stack's.
    Randomized,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// 32 bits: faster, less memory; small singular values are lost.
    F32,
    /// 64 bits.
    F64,
}

/// What to convert, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The model: a folder with config.json and safetensors files.
    model_dir: PathBuf,
    /// The folder to make; conversion.json in it says what was done and lost, layer by layer.
    out_dir: PathBuf,
    /// Groups that the experts of a layer fall into; must divide their number. Fewer save more.
    #[arg(long, value_name = "G")]
    groups: usize,
    /// Width of the latents; usually the experts' intermediate width. Smaller saves more and loses more.
    #[arg(long, value_name = "L")]
    latent: usize,
    /// First reduce every expert's matrices to this rank. Never lowers the error; without it nothing is reduced.
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Factor the down projections too.
    #[arg(long)]
    factored_down: bool,
    /// Which experts are put together.
    #[arg(long, value_enum, value_name = "HOW", default_value = "id")]
    group_by: Grouping,
    /// A safetensors file with inputs that the layers see, `model.layers.0.mlp.input` [tokens, hidden] and so on for every mixture of
    /// experts: the error on these is made small, not that of the matrices.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// How singular vectors are computed.
    #[arg(long, value_enum, value_name = "HOW", default_value = "exact")]
    svd: Svd,
    /// What they are computed in.
    #[arg(long, value_enum, value_name = "P", default_value = "f64")]
    precision: Precision,
    /// What the new matrices are written in [default: what the layer had]
    #[arg(long, value_enum, value_name = "D")]
    dtype: Option<Written>,
    /// Layers at work at once. Each layer uses all cores as it is; N of them need N times the memory. The result is the same.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    #[command(flatten)]
    replacement: Replacement,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Options {
    fn model_options(&self) -> ModelOptions {
        let mut latent = LatentOptions::new(self.groups, self.latent);
        latent.rank = self.rank;
        latent.factored_down = self.factored_down;
        latent.group_by = match self.group_by {
            Grouping::Id => GroupBy::Id,
            Grouping::Similarity => GroupBy::Similarity,
        };
        latent.svd.precision = match self.precision {
            Precision::F32 => SvdPrecision::F32,
            Precision::F64 => SvdPrecision::F64,
        };
        latent.svd.method = match self.svd {
            Svd::Exact => SvdMethod::Exact,
            // As Halko, Martinsson and Tropp advise (arXiv 0909.4061, section 4): a few directions more, and two multiplications where singular
            // values fall slowly.
            Svd::Randomized => SvdMethod::Randomized {
                oversampling: 16,
                power_iterations: 2,
                seed: 0,
            },
        };
        let mut options = ModelOptions::new(latent);
        options.calibration.clone_from(&self.calibration);
        options.dtype = self.dtype.map(Dtype::from);
        options.jobs = self.jobs;
        options.overwrite = self.replacement.overwrite;
        options.restart = self.replacement.restart;
        options
    }
}

fn percent(change: f64) -> String {
    format!("{:+.1} %", 100.0 * change)
}

fn change(before: u64, after: f64) -> f64 {
    if before == 0 {
        0.0
    } else {
        after / before as f64 - 1.0
    }
}

fn print(report: &ModelReport) {
    let rows: Vec<[String; 6]> = report
        .layers
        .iter()
        .map(|layer| {
            let (report, errors) = (&layer.report, &layer.report.errors.whole);
            let error = errors.weighted.unwrap_or(errors.unweighted);
            let parameters = change(report.parameters.before, report.parameters.after as f64);
            let flops = report.active.as_ref().map(|active| active.expected_change);
            [
                layer.path.clone(),
                format!("{} in {}", report.experts, report.groups),
                format!("{:.4}", report.kept_energy),
                format!("{error:.3e}"),
                percent(parameters),
                flops.map_or_else(String::new, percent),
            ]
        })
        .collect();
    let head = [
        "layer",
        "experts",
        "kept energy",
        "relative error",
        "parameters",
        "FLOPs a token",
    ]
    .map(str::to_owned);
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]);
        cells
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for row in [&head].into_iter().chain(&rows) {
        let (path, width) = (&row[0], widths[0]);
        let mut line = format!("{path:<width$}");
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            line += &format!("  {cell:>width$}");
        }
        println!("{}", line.trim_end());
    }
    let totals = &report.totals;
    println!(
        "experts: {} parameters, {} before ({})",
        totals.parameters_after,
        totals.parameters_before,
        percent(change(
            totals.parameters_before,
            totals.parameters_after as f64
        ))
    );
    println!(
        "experts: {:.0} FLOPs a token expected, {} before ({}); {} at most",
        totals.flops_after_expected,
        totals.flops_before,
        percent(totals.expected_change),
        totals.flops_after_most
    );
    if let Some(bytes) = report.run.peak_memory_bytes {
        println!("peak memory: {:.1} MiB", bytes as f64 / f64::from(1 << 20));
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let bar = bar("{bar:40} {pos}/{len} files, {elapsed} [{eta}] {msg}", 0);
    let listener = |progress: Progress<'_>| match progress {
        Progress::Notice(text) => bar.suspend(|| eprintln!("rankmix: {text}")),
        Progress::Written { finished, of } => {
            bar.set_length(of as u64);
            bar.set_position(finished as u64);
        }
        Progress::Layer { path, .. } => bar.set_message(path.to_owned()),
    };
    let report = convert_model(
        &options.model_dir,
        &options.out_dir,
        &options.model_options(),
        &listener,
    );
    bar.finish_and_clear();
    let report = report?;
    for warning in &report.warnings {
        eprintln!("rankmix: warning: {warning}");
    }
    if options.json {
        let text = serde_json::to_string(&report).map_err(|error| Error::Format {
            path: "the report".into(),
            reason: error.to_string(),
        })?;
        println!("{text}");
    } else {
        print(&report);
        println!("written to {}", options.out_dir.display());
    }
    Ok(ExitCode::SUCCESS)
}
