//! A small byte-level language model, trained on one language, then frozen and adapted to eight: LoRA against MoE-LoRA against
//! RotMoLE at the same number of trainable parameters. On whatever GPU there is, or on the CPU.
//!
//!     cargo run --release --example finetune
//!     cargo run --release --example finetune -- --steps 1200 --rotation cayley --gate-input latent
//!     cargo run --release --example finetune -- --text FOLDER_WITH_ONE_FILE_A_LANGUAGE

mod folder;
mod model;
mod pictures;
mod run;
mod table;
mod text;
mod training;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use model::{Adapter, WIDTH};
use rankmix::layers::{GateInput, Routing};
use rankmix::ops::Rotation;
use rankmix::{Device, DeviceOptions};
use run::{Outcome, Run};
use table::Row;
use text::Language;

/// Train a small language model on one language, then adapt it to all of them.
#[derive(Debug, Parser)]
struct Options {
    /// A folder with one UTF-8 text file a language, NAME.txt [default: the phrasebook of the examples]
    #[arg(long, value_name = "DIR")]
    text: Option<PathBuf>,
    /// The language that the base is trained on.
    #[arg(long, default_value = "en")]
    base: String,
    /// Steps of every adapter.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Steps of the base.
    #[arg(long, default_value_t = 150)]
    base_steps: usize,
    /// Runs of every adapter, from different seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Rank of the experts.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Experts of each adapted layer.
    #[arg(long, default_value_t = 4)]
    experts: usize,
    /// Experts a token takes.
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// `planes`, `givens`, `cayley`, `butterfly`, `brick_wall:N` (N layers) or `householder`.
    #[arg(long, default_value = "planes")]
    rotation: Rotation,
    /// What the rotation gate looks at: `input`, `latent`, or `static` for nothing.
    #[arg(long, default_value = "input")]
    gate_input: GateInput,
    /// `cpu`, `vulkan`, `metal`, `dx12`, `gl`, or part of an adapter's name [default: RANKMIX_DEVICE, or the best there is]
    #[arg(long, value_name = "D")]
    device: Option<String>,
    /// Where the two pictures go.
    #[arg(long, value_name = "DIR", default_value = "finetune-results")]
    out: PathBuf,
}

/// Trainable elements of one layer that is adapted with rank r: LoRA, then a mixture of LoRA experts.
fn lora_elements(rank: usize) -> usize {
    rank * 2 * WIDTH
}

fn mixture_elements(rank: usize, experts: usize) -> usize {
    experts * (rank * 2 * WIDTH + WIDTH)
}

/// The same of CoMoL with core routing.
fn comol_elements(rank: usize, experts: usize) -> usize {
    rank * 2 * WIDTH + experts * rank * (rank + 1)
}

/// The adapters to compare: all with as many trainable parameters as RotMoLE, and MoE-LoRA once more with its rank and experts.
fn adapters(options: &Options) -> Result<Vec<Adapter>, rankmix::Error> {
    let (rank, experts) = (options.rank, options.experts);
    let router = Routing::new(experts, options.top_k);
    let gate_input = options.gate_input;
    let gate_width = match gate_input {
        GateInput::Input => WIDTH,
        GateInput::Latent => rank,
        GateInput::Static => 1,
    };
    let target =
        mixture_elements(rank, experts) + experts * options.rotation.numbers(rank)? * gate_width;
    let nearest = |elements: &dyn Fn(usize) -> usize| {
        (1..=4 * WIDTH)
            .min_by_key(|&r| elements(r).abs_diff(target))
            .unwrap_or(1)
    };
    let lora_rank = nearest(&lora_elements);
    let mixture_rank = nearest(&|r| mixture_elements(r, experts));
    let mut adapters = vec![
        Adapter::Lora { rank: lora_rank },
        Adapter::MoeLora {
            rank: mixture_rank,
            router,
        },
    ];
    if mixture_rank != rank {
        adapters.push(Adapter::MoeLora { rank, router });
    }
    adapters.push(Adapter::RotMole {
        rank,
        router,
        rotation: options.rotation,
        gate_input,
    });
    adapters.push(Adapter::CoMol {
        rank: nearest(&|r| comol_elements(r, experts)),
        experts,
    });
    Ok(adapters)
}

fn progress(steps: usize) -> Result<ProgressBar, Box<dyn Error>> {
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:32}] {pos}/{len} {msg}")?
        .progress_chars("=> ");
    Ok(ProgressBar::new(steps as u64).with_style(style))
}

/// The mean over runs of what is at every index.
fn mean_of(runs: &[&[f64]]) -> Vec<f64> {
    let length = runs.first().map_or(0, |run| run.len());
    (0..length)
        .map(|index| runs.iter().map(|run| run[index]).sum::<f64>() / runs.len() as f64)
        .collect()
}

fn draw(
    folder: &Path,
    languages: &[Language],
    compared: &[(Adapter, Vec<Outcome>)],
) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(folder)?;
    let curves: Vec<pictures::Curve> = compared
        .iter()
        .map(|(adapter, outcomes)| pictures::Curve {
            name: adapter.title(),
            losses: mean_of(
                &outcomes
                    .iter()
                    .map(|outcome| &outcome.losses[..])
                    .collect::<Vec<_>>(),
            ),
        })
        .collect();
    let loss = folder.join("loss.svg");
    pictures::loss_curves(
        &loss,
        "Adapting a frozen language model to eight languages",
        &curves,
    )?;
    println!("loss curves: {}", loss.display());
    let routed = compared
        .iter()
        .rev()
        .filter_map(|(adapter, outcomes)| Some((adapter, outcomes.first()?)))
        .find(|(_, outcome)| !outcome.shares.is_empty());
    if let Some((adapter, outcome)) = routed {
        let map = folder.join("experts.svg");
        let names: Vec<String> = languages
            .iter()
            .map(|language| language.name.clone())
            .collect();
        let title = format!("{}: which expert serves which language", adapter.name());
        pictures::expert_map(&map, &title, &names, &outcome.shares)?;
        println!("experts by language: {}", map.display());
    }
    Ok(())
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let folder = options
        .text
        .clone()
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data"));
    let languages = folder::read(&folder)?;
    let adapters = adapters(options)?;
    let Some(base_language) = languages
        .iter()
        .find(|language| language.name == options.base)
    else {
        let names: Vec<&str> = languages
            .iter()
            .map(|language| &language.name[..])
            .collect();
        return Err(format!(
            "there is no language `{}`; there are {}",
            options.base,
            names.join(", ")
        )
        .into());
    };
    let device = Device::open_with(&DeviceOptions {
        request: options.device.clone(),
        ..DeviceOptions::default()
    })?;
    println!("device: {}", device.name());

    let every: Vec<&Language> = languages.iter().collect();
    let only_base = [base_language];
    let run = |adapter, base, train_on, steps, seed| Run {
        device: &device,
        adapter,
        base,
        train_on,
        evaluate_on: &languages,
        steps,
        seed,
    };
    let bar = progress(options.base_steps)?;
    let base = run(Adapter::None, &[], &only_base, options.base_steps, 0).go(&bar)?;
    bar.finish_and_clear();
    let mut rows = vec![Row::new(&Adapter::None, &[&base])];
    println!(
        "base trained on {} in {:.0} s; adapting to {} languages",
        base_language.name,
        base.seconds,
        languages.len()
    );

    let mut compared = Vec::new();
    for adapter in adapters {
        let bar = progress(options.steps * options.seeds as usize)?;
        let mut outcomes = Vec::new();
        for seed in 1..=options.seeds {
            outcomes.push(run(adapter, &base.weights, &every, options.steps, seed).go(&bar)?);
        }
        bar.finish_and_clear();
        rows.push(Row::new(&adapter, &outcomes.iter().collect::<Vec<_>>()));
        compared.push((adapter, outcomes));
    }
    println!();
    table::print(&languages, &rows, options.seeds);
    println!();
    draw(&options.out, &languages, &compared)
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("finetune: {error}");
            ExitCode::FAILURE
        }
    }
}
