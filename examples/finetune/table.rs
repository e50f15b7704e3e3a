//! The table: held-out bits per byte by adapter and language.

use crate::model::Adapter;
use crate::run::Outcome;
use crate::text::Language;

/// A line of the table: the mean over its runs.
pub struct Row {
    name: String,
    rank: Option<usize>,
    experts: Option<usize>,
    parameters: usize,
    bits: Vec<f64>,
    mean: f64,
    deviation: Option<f64>,
    seconds: f64,
}

impl Row {
    pub fn new(adapter: &Adapter, outcomes: &[&Outcome]) -> Self {
        let count = outcomes.len().max(1) as f64;
        let languages = outcomes.first().map_or(0, |outcome| outcome.bits.len());
        let bits: Vec<f64> = (0..languages)
            .map(|l| outcomes.iter().map(|outcome| outcome.bits[l]).sum::<f64>() / count)
            .collect();
        let means: Vec<f64> = outcomes
            .iter()
            .map(|outcome| outcome.bits.iter().sum::<f64>() / languages.max(1) as f64)
            .collect();
        let mean = means.iter().sum::<f64>() / count;
        let squares = means.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>();
        Self {
            name: adapter.name(),
            rank: adapter.rank(),
            experts: adapter.experts(),
            parameters: outcomes.first().map_or(0, |outcome| outcome.parameters),
            bits,
            mean,
            deviation: (outcomes.len() > 1).then(|| (squares / (count - 1.0)).sqrt()),
            seconds: outcomes.iter().map(|outcome| outcome.seconds).sum::<f64>() / count,
        }
    }
}

/// Prints all rows. Seconds are those of one run.
pub fn print(languages: &[Language], rows: &[Row], seeds: u64) {
    let or_dash =
        |number: Option<usize>| number.map_or("-".to_owned(), |number| number.to_string());
    print!(
        "{:<16} {:>4} {:>7} {:>10}",
        "adapter", "rank", "experts", "parameters"
    );
    for language in languages {
        print!(" {:>6}", language.name);
    }
    println!(" {:>15} {:>7}", "mean", "seconds");
    for row in rows {
        print!(
            "{:<16} {:>4} {:>7} {:>10}",
            row.name,
            or_dash(row.rank),
            or_dash(row.experts),
            row.parameters
        );
        for bits in &row.bits {
            print!(" {bits:>6.3}");
        }
        let deviation = row
            .deviation
            .map_or(String::new(), |deviation| format!(" ± {deviation:.3}"));
        println!(
            " {:>15} {:>7.1}",
            format!("{:.3}{deviation}", row.mean),
            row.seconds
        );
    }
    println!(
        "held-out bits per byte, lower is better; mean ± standard deviation over {seeds} seeds; seconds a run"
    );
}
