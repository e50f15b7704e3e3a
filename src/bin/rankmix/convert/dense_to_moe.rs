//! `rankmix convert dense-to-moe`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use rankmix::Result;
use rankmix::convert::{DenseLayerReport, DenseModelOptions, convert_dense_model};
use rankmix::formats::MoeLayout;

use crate::convert::{FILES, Replacement, bar, files_on, warn_not_copied};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// Gates over the chosen experts; for this top-k alone. Its attention is Llama's.
    Mixtral,
    /// Qwen3-MoE's without `norm_topk_prob`: gates over all experts; top-k can be changed in config.json afterwards. Its attention is Qwen3's, which norms queries and keys: other
    /// programs load no Llama so.
    Qwen,
}

/// What to convert, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A folder with config.json and safetensors files, or a GGUF file, of which feed-forwards and their norms are written.
    model: PathBuf,
    /// The folder to make; conversion.json in it says what fewer experts keep of the outputs.
    out_dir: PathBuf,
    /// Experts in each layer; must divide the feed-forward's width.
    #[arg(long, value_name = "E")]
    experts: usize,
    /// Experts for each token.
    #[arg(long, value_name = "K")]
    top_k: usize,
    /// The names and the form of the gates.
    #[arg(long, value_enum, value_name = "LAYOUT", default_value = "mixtral")]
    layout: Layout,
    /// A safetensors file with inputs of the feed-forwards, `model.layers.0.mlp.input` [tokens, hidden] and so on [default: random directions
    /// times the weights of the norm before each]
    #[arg(long, value_name = "FILE")]
    activations: Option<PathBuf>,
    /// Of everything random.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    replacement: Replacement,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let bar = bar(FILES, 0);
    let listener = files_on(&bar);
    let conversion = DenseModelOptions {
        experts: options.experts,
        top_k: options.top_k,
        layout: match options.layout {
            Layout::Mixtral => MoeLayout::Mixtral,
            Layout::Qwen => MoeLayout::PerExpert,
        },
        activations: options.activations.clone(),
        seed: options.seed,
        overwrite: options.replacement.overwrite,
        restart: options.replacement.restart,
    };
    let report = convert_dense_model(&options.model, &options.out_dir, &conversion, &listener);
    bar.finish_and_clear();
    let report = report?;
    for warning in &report.warnings {
        eprintln!("rankmix: warning: {warning}");
    }
    warn_not_copied(&report.not_copied);
    print(&report.layers);
    println!("written to {}", options.out_dir.display());
    Ok(ExitCode::SUCCESS)
}

fn print(layers: &[DenseLayerReport]) {
    println!(
        "part of the outputs' energy that experts keep, mean over {} layers",
        layers.len()
    );
    println!("experts  router  random  largest outputs");
    let ks = layers
        .first()
        .map_or(&[][..], |layer| &layer.report.kept_output);
    for (row, kept) in ks.iter().enumerate() {
        let mean = |part: fn(&rankmix::convert::KeptOutput) -> f64| {
            let parts = layers
                .iter()
                .map(|layer| part(&layer.report.kept_output[row]));
            parts.sum::<f64>() / layers.len() as f64
        };
        println!(
            "{:7}  {:6.3}  {:6.3}  {:6.3}",
            kept.top_k,
            mean(|kept| kept.router),
            mean(|kept| kept.random),
            mean(|kept| kept.largest)
        );
    }
}
