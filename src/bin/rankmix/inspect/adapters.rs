//! What is in an adapter's folder.

use std::collections::BTreeMap;
use std::path::Path;

use rankmix::Result;
use rankmix::formats::{Adapter, MixtureAdapter, MixtureLayer, PeftAdapter, Target};
use rankmix::layers::{AdapterScale, CoreRouting};

use crate::inspect::{counted, number, pattern, print_rows, rows_of};

pub(crate) fn print(path: &Path, all: bool) -> Result<()> {
    let (adapter, tensors) = Adapter::open(path)?;
    match &adapter {
        Adapter::Lora(adapter) => lora(path, adapter),
        Adapter::Mixture(adapter) => {
            let kind = adapter
                .kind()
                .map_or_else(String::new, |kind| kind.to_string());
            println!("{}: {kind} adapter of rankmix", path.display());
            mixture(adapter);
        }
        Adapter::MoePeft(adapter) => {
            println!("{}: adapter of MoE-PEFT", path.display());
            mixture(&adapter.mixture);
            pairs(&adapter.plain);
        }
    }
    print_rows(rows_of(&tensors), all);
    Ok(())
}

fn warn(unknown: &[&str]) {
    for key in unknown {
        eprintln!("rankmix: warning: the key `{key}` is not known; it is kept and has no effect");
    }
}

fn mixture(adapter: &MixtureAdapter) {
    if let Some(base) = adapter.others.get("base_model_name_or_path") {
        println!("  base model = {base}");
    }
    warn(&adapter.unknown_keys());
    let mut kinds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (path, layer) in &adapter.layers {
        kinds.entry(described(layer)).or_default().push(path);
    }
    print_kinds(kinds);
    let blocks: std::collections::BTreeSet<&String> = adapter.blocks.values().collect();
    for (block, count) in counted(blocks.into_iter().map(|block| pattern(block))) {
        println!("  {block} ({count}): one gate for all its linear layers");
    }
    println!("  {} elements in all parameters", adapter.elements());
}

/// A layer's options in one line.
fn described(layer: &MixtureLayer) -> String {
    let (base, options) = (layer.base(), layer.options());
    let over = match options.scale {
        AdapterScale::Standard => "rank",
        AdapterScale::RankStabilized => "√rank",
    };
    let mut line = format!(
        "linear {} to {}, {}, rank {}, alpha {} / {over}",
        base.d_in,
        base.d_out,
        number(layer.experts(), "expert"),
        options.rank,
        options.alpha
    );
    match layer.routing() {
        Some(routing) => line += &format!(", {} a token", routing.top_k),
        None => line += ", all for each token",
    }
    match layer {
        MixtureLayer::MoeLora(_) => {}
        MixtureLayer::RotMole(layer) => {
            let bounded = if layer.bounded { ", bounded" } else { "" };
            line += &format!(
                ", rotation {} by the {}{bounded}",
                layer.rotation.name(),
                layer.gate_input
            );
        }
        MixtureLayer::CoMol(layer) => {
            line += match layer.routing {
                CoreRouting::Core => ", routed by the latent",
                CoreRouting::Raw => ", routed by the input",
            };
            for (matrix, shared) in [("A", &layer.shared_a), ("B", &layer.shared_b)] {
                if let Some(shared) = shared {
                    line += &format!(", {matrix} shared as {}", pattern(shared));
                }
            }
        }
    }
    line
}

fn lora(path: &Path, adapter: &PeftAdapter) {
    let config = &adapter.config;
    println!("{}: LoRA adapter of PEFT", path.display());
    if let Some(base) = config.others.get("base_model_name_or_path") {
        println!("  base model = {base}");
    }
    let over = if config.rank_stabilised {
        "√rank"
    } else {
        "rank"
    };
    println!(
        "  rank {}, alpha {}, scale alpha / {over}",
        config.rank, config.alpha
    );
    for (what, count) in [
        ("rank", config.rank_pattern.len()),
        ("alpha", config.alpha_pattern.len()),
    ] {
        if count > 0 {
            println!("  {} with another {what}", number(count, "pattern"));
        }
    }
    warn(&config.unknown_keys());
    pairs(adapter);
    if !adapter.others.is_empty() {
        let others = number(adapter.others.len(), "tensor");
        println!("  {others} of modules that were trained whole");
    }
}

/// The plain pairs.
fn pairs(adapter: &PeftAdapter) {
    let mut kinds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (layer, pair) in &adapter.pairs {
        let what = match pair.target {
            Target::Linear => "linear",
            Target::Embedding => "embedding",
        };
        let [d_in, d_out] = [pair.a.shape().last(), pair.b.shape().dims()[0]];
        let kind = format!(
            "{what} {d_in} to {d_out}, rank {}, scale {}",
            pair.rank(),
            pair.scale
        );
        kinds.entry(kind).or_default().push(layer);
    }
    print_kinds(kinds);
}

/// What each kind of layer is, and which layers are of it: those whose names differ in numbers alone in one line.
fn print_kinds(kinds: BTreeMap<String, Vec<&str>>) {
    for (kind, layers) in kinds {
        let names: BTreeMap<String, usize> = counted(layers.iter().map(|layer| pattern(layer)));
        for (name, count) in names {
            println!("  {name} ({count}): {kind}");
        }
    }
}
