//! The mixtures of experts of a model.

use std::collections::BTreeMap;
use std::path::Path;

use rankmix::formats::{MoeLayer, MoeModel};

use super::{number, pattern};

fn described(layer: &MoeLayer) -> String {
    let (experts, widths) = (
        layer.experts,
        format!("{} to {}", layer.hidden, layer.intermediate),
    );
    let mut text = format!("{experts} experts {widths}, {:?}", layer.dtype);
    if let Some(latent) = &layer.latent {
        text += &format!(
            ", latent width {} in {}{}",
            latent.latent,
            number(latent.groups, "group"),
            if latent.factored_down {
                ", down factored"
            } else {
                ""
            }
        );
    }
    if let Some(shared) = layer.shared {
        let gate = if shared.sigmoid_gate { ", gated" } else { "" };
        text += &format!(", a shared expert {}{gate}", shared.intermediate);
    }
    if layer.router_bias {
        text += ", a bias of the choice";
    }
    text + &format!("; {}", layer.layout.name())
}

/// Layers that differ in numbers alone are in one line. Nothing is said of what is no folder of a model.
pub(crate) fn print(folder: &Path) {
    if !folder.join("config.json").exists() {
        return;
    }
    let model = match MoeModel::open(folder) {
        Ok(model) => model,
        Err(error) => {
            eprintln!("rankmix: warning: mixtures of experts are not read: {error}");
            return;
        }
    };
    let mut kinds: BTreeMap<(String, String), usize> = BTreeMap::new();
    for layer in model.layers() {
        let kind = (pattern(&layer.path), described(layer));
        *kinds.entry(kind).or_default() += 1;
    }
    if kinds.is_empty() {
        return;
    }
    let family = match model.config().model_type() {
        "" => "no model_type",
        family => family,
    };
    match model.config().top_k() {
        Ok(top_k) => println!("mixtures of experts ({family}): {top_k} experts a token"),
        Err(error) => println!("mixtures of experts ({family}): {error}"),
    }
    for ((path, kind), count) in kinds {
        println!("  {path} ({count}): {kind}");
    }
}
