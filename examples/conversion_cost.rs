//! Time and peak memory of turning one layer into latent experts, on random weights in the shape of Qwen3-30B-A3B's: 128 experts of 768 x 2048 in 32
//! groups of latent width 768.
//!
//! `cargo run --release --features cli --example conversion_cost -- [f32|f64] [exact|randomized] [--experts E] [--factored-down] [--calibration TOKENS] [--similarity]`

use std::time::Instant;

use clap::Parser;
use rankmix::convert::{
    Calibration, GroupBy, LatentOptions, SvdMethod, SvdOptions, SvdPrecision, convert_layer,
};
use rankmix::formats::MoeExperts;
use rankmix::{Result, Tensor};

#[derive(Debug, Parser)]
struct Options {
    #[arg(default_value = "f64")]
    precision: String,
    #[arg(default_value = "exact")]
    method: String,
    #[arg(long, default_value_t = 128)]
    experts: usize,
    #[arg(long, default_value_t = 768)]
    intermediate: usize,
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Experts in a group.
    #[arg(long, default_value_t = 4)]
    group: usize,
    #[arg(long, default_value_t = 768)]
    latent: usize,
    #[arg(long)]
    rank: Option<usize>,
    #[arg(long)]
    factored_down: bool,
    #[arg(long)]
    calibration: Option<usize>,
    #[arg(long)]
    similarity: bool,
    /// Of `randomized`; as many as `rankmix convert moe-to-latent` does.
    #[arg(long, default_value_t = 2)]
    power_iterations: usize,
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Uniform in -1..1, from the element's number.
fn noise(elements: usize, seed: u32) -> Vec<f32> {
    (0..elements)
        .map(|i| {
            let [bits, _] = rankmix::ops::threefry([i as u32, (i >> 32) as u32], [seed, 1]);
            bits as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect()
}

/// A line of `/proc/self/status` in MiB, where there is one.
fn memory_mib(line: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(line))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

fn main() -> Result<()> {
    let options = Options::parse();
    rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build_global()
        .unwrap_or_default();
    let [e, m, n] = [options.experts, options.intermediate, options.hidden];
    let experts = MoeExperts {
        gate: Tensor::f32([e, m, n], noise(e * m * n, 1))?,
        up: Tensor::f32([e, m, n], noise(e * m * n, 2))?,
        down: Tensor::f32([e, n, m], noise(e * m * n, 3))?,
    };
    let calibration = options
        .calibration
        .map(|tokens| {
            let tokens = Tensor::f32([tokens, n], noise(tokens * n, 4))?;
            Calibration::from_activations(&tokens)
        })
        .transpose()?;
    let latent = LatentOptions {
        rank: options.rank,
        factored_down: options.factored_down,
        group_by: if options.similarity {
            GroupBy::Similarity
        } else {
            GroupBy::Id
        },
        svd: SvdOptions {
            precision: if options.precision == "f32" {
                SvdPrecision::F32
            } else {
                SvdPrecision::F64
            },
            method: if options.method == "exact" {
                SvdMethod::Exact
            } else {
                SvdMethod::Randomized {
                    oversampling: 16,
                    power_iterations: options.power_iterations,
                    seed: 0,
                }
            },
        },
        ..LatentOptions::new(e / options.group, options.latent)
    };
    let before_mib = memory_mib("VmRSS").unwrap_or(f64::NAN);
    let start = Instant::now();
    let (_, report) = convert_layer(&experts, calibration.as_ref(), &latent)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak_mib = memory_mib("VmHWM").unwrap_or(f64::NAN);
    println!(
        "{} {} on {} threads: {seconds:.1} s, {before_mib:.0} MiB before, {peak_mib:.0} MiB at the peak; kept {:.6}, error {:.6}, weighted {:?}",
        options.precision,
        options.method,
        rayon::current_num_threads(),
        report.kept_energy,
        report.errors.whole.unweighted,
        report.errors.whole.weighted,
    );
    Ok(())
}
