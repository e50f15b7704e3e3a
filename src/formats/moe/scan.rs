//! Finding the layers that are mixtures of experts by the names of a checkpoint's tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::error::{Error, Result};
use crate::formats::moe::config::{LatentConfig, MoeConfig};
use crate::formats::moe::latent::{latent_name, latent_parts};
use crate::formats::moe::layout::{FUSED_DOWN, FUSED_GATE_UP, LATENT_EXPERT_PARTS, MoeLayout};
use crate::formats::moe::weights::equal_groups;
use crate::formats::{Checkpoint, TensorEntry};
use crate::layers::SharedExpert;

/// What stands between a layer's path and its experts.
const EXPERTS: &str = ".experts.";
/// The router, behind a layer's path.
pub(crate) const ROUTER: &str = "gate.weight";
/// The bias of the choice, behind a layer's path.
pub(crate) const ROUTER_BIAS: &str = "gate.e_score_correction_bias";
/// The gate of a shared expert, behind a layer's path.
pub(crate) const SHARED_GATE: &str = "shared_expert_gate.weight";
/// The names that families have for the shared expert.
const SHARED: [&str; 2] = ["shared_expert", "shared_experts"];

/// A layer of a checkpoint that is a mixture of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeLayer {
    /// What stands before the names of its tensors: `model.layers.0.mlp`.
    pub path: String,
    /// How its experts are kept.
    pub layout: MoeLayout,
    /// Experts E.
    pub experts: usize,
    /// Hidden width n.
    pub hidden: usize,
    /// Intermediate width m.
    pub intermediate: usize,
    /// What there is besides if the experts are latent.
    pub latent: Option<LatentLayer>,
    /// The shared expert, if there is one.
    pub shared: Option<SharedExpert>,
    /// Whether the router has a bias of the choice.
    pub router_bias: bool,
    /// The type of the experts' elements.
    pub dtype: Dtype,
    /// The name of the shared expert behind the path.
    pub(crate) shared_name: &'static str,
    /// The names of all tensors of the experts, none of the router or the shared expert.
    pub(crate) tensors: Vec<String>,
}

/// The groups of a layer of latent experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatentLayer {
    /// Groups G.
    pub groups: usize,
    /// Latent width l.
    pub latent: usize,
    /// Whether the down projections are factored too.
    pub factored_down: bool,
    /// The group of each expert.
    pub expert_to_group: Vec<usize>,
}

impl MoeLayer {
    /// The names of its experts' tensors; neither the router nor the shared expert is among them.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(String::as_str)
    }
}

/// A path's parts, numbers as numbers, so that layer 10 comes behind layer 2.
fn order(path: &str) -> Vec<(u64, String)> {
    path.split('.')
        .map(|part| match part.parse() {
            Ok(number) => (number, String::new()),
            Err(_) => (u64::MAX, part.to_owned()),
        })
        .collect()
}

struct Scan<'a> {
    folder: &'a Path,
    checkpoint: &'a Checkpoint,
    config: &'a MoeConfig,
    latent: Option<LatentConfig>,
}

/// The mixtures of a checkpoint, in the order of their layers, every tensor of theirs there and of the shape it must have.
pub(crate) fn scan(
    folder: &Path,
    checkpoint: &Checkpoint,
    config: &MoeConfig,
) -> Result<Vec<MoeLayer>> {
    let scan = Scan {
        folder,
        checkpoint,
        config,
        latent: config.latent()?,
    };
    // What stands behind `experts.` and `groups.`, by layer.
    let mut paths: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (name, _) in checkpoint.tensors() {
        if let Some((path, rest)) = name.split_once(EXPERTS) {
            paths.entry(path).or_default().insert(rest);
        }
    }
    for (name, _) in checkpoint.tensors() {
        let routers = [".block_sparse_moe.gate.weight", ".mlp.gate.weight"];
        let router = routers.iter().any(|end| name.ends_with(end));
        let path = name.strip_suffix(".gate.weight");
        if let Some(path) = path.filter(|path| router && !paths.contains_key(path)) {
            return Err(checkpoint.wrong(
                name,
                &format!(
                    "it is a router, and there is no tensor of an expert under `{path}{EXPERTS}`"
                ),
            ));
        }
    }
    let mut layers = paths
        .iter()
        .map(|(path, rests)| scan.layer(path, rests))
        .collect::<Result<Vec<_>>>()?;
    layers.sort_by_key(|layer| order(&layer.path));
    config.check_mixtures(&layers)?;
    Ok(layers)
}

impl Scan<'_> {
    fn wrong(&self, reason: String) -> Error {
        Error::Format {
            path: self.folder.to_owned(),
            reason,
        }
    }

    fn find(&self, name: &str, why: &str) -> Result<&TensorEntry> {
        self.checkpoint
            .entry(name)
            .ok_or_else(|| self.wrong(format!("tensor `{name}` is missing: {why}")))
    }

    /// A matrix's extents.
    fn extents<const N: usize>(&self, name: &str, why: &str) -> Result<[usize; N]> {
        let shape = &self.find(name, why)?.shape;
        <[usize; N]>::try_from(shape.as_slice())
            .ok()
            .filter(|extents| !extents.contains(&0))
            .ok_or_else(|| {
                self.checkpoint.wrong(
                    name,
                    &format!("it has the shape {shape:?}: {N} extents of at least 1 are expected"),
                )
            })
    }

    fn expect(&self, name: &str, expected: &[usize], why: &str) -> Result<()> {
        let entry = self.find(name, why)?;
        if entry.shape != expected {
            let reason = format!(
                "it has the shape {:?}: {expected:?} is expected ({why})",
                entry.shape
            );
            return Err(self.checkpoint.wrong(name, &reason));
        }
        let read = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];
        if !read.contains(&entry.dtype) {
            let reason = format!(
                "its elements are of type {:?}: F64, F32, F16 and BF16 are read",
                entry.dtype
            );
            return Err(self.checkpoint.wrong(name, &reason));
        }
        Ok(())
    }

    fn layer(&self, path: &str, rests: &BTreeSet<&str>) -> Result<MoeLayer> {
        let mut layouts: Vec<MoeLayout> = Vec::new();
        for rest in rests {
            let Some(layout) = MoeLayout::of(rest) else {
                return Err(self.checkpoint.wrong(
                    &format!("{path}{EXPERTS}{rest}"),
                    "it is of no layout of experts that is read",
                ));
            };
            if !layouts.contains(&layout) {
                layouts.push(layout);
            }
        }
        let &[layout] = layouts.as_slice() else {
            return Err(self.wrong(format!(
                "the experts of `{path}` are kept in several layouts: {layouts:?}"
            )));
        };
        let router = format!("{path}.{ROUTER}");
        let [experts, hidden] = self.extents(&router, "the layer has experts and no router")?;
        self.expect(&router, &[experts, hidden], "the router")?;
        let first = rests.first().copied().unwrap_or_default();
        let first = self.find(&format!("{path}{EXPERTS}{first}"), "an expert")?;
        let mut layer = MoeLayer {
            path: path.to_owned(),
            layout,
            experts,
            hidden,
            intermediate: 0,
            latent: None,
            shared: None,
            router_bias: false,
            dtype: first.dtype,
            shared_name: "",
            tensors: Vec::new(),
        };
        match layout {
            MoeLayout::Fused => self.fused(&mut layer)?,
            MoeLayout::Latent => self.latent(&mut layer)?,
            MoeLayout::Mixtral | MoeLayout::PerExpert => self.each(&mut layer)?,
        }
        let known: BTreeSet<&str> = layer.tensors().collect();
        for rest in rests {
            let name = format!("{path}{EXPERTS}{rest}");
            if !known.contains(name.as_str()) {
                return Err(self.checkpoint.wrong(
                    &name,
                    &format!("it belongs to none of the {experts} experts that the router has"),
                ));
            }
        }
        let bias = format!("{path}.{ROUTER_BIAS}");
        if self.checkpoint.entry(&bias).is_some() {
            self.expect(&bias, &[experts], "a number for each expert")?;
            layer.router_bias = true;
        }
        self.shared(&mut layer)?;
        self.config.check_layer(path, experts, layer.shared)?;
        Ok(layer)
    }

    fn each(&self, layer: &mut MoeLayer) -> Result<()> {
        let (path, experts, n) = (&layer.path, layer.experts, layer.hidden);
        let why = format!("the router has {experts} experts of width {n}");
        let Some(parts) = layer.layout.projections() else {
            return Ok(());
        };
        let [m, _] = self.extents(&format!("{path}{EXPERTS}0.{}", parts[0]), &why)?;
        let mut tensors = Vec::new();
        for (part, shape) in parts.iter().zip([[m, n], [m, n], [n, m]]) {
            for expert in 0..experts {
                let name = format!("{path}{EXPERTS}{expert}.{part}");
                self.expect(&name, &shape, &why)?;
                tensors.push(name);
            }
        }
        (layer.intermediate, layer.tensors) = (m, tensors);
        Ok(())
    }

    fn fused(&self, layer: &mut MoeLayer) -> Result<()> {
        let (path, experts, n) = (&layer.path, layer.experts, layer.hidden);
        let why = format!("the router has {experts} experts of width {n}");
        let names = [FUSED_GATE_UP, FUSED_DOWN].map(|part| format!("{path}{EXPERTS}{part}"));
        let [_, twice, _] = self.extents(&names[0], &why)?;
        if !twice.is_multiple_of(2) {
            return Err(self.checkpoint.wrong(
                &names[0],
                &format!("it has {twice} rows an expert: gate and up are to have as many each"),
            ));
        }
        let m = twice / 2;
        self.expect(&names[0], &[experts, twice, n], &why)?;
        self.expect(&names[1], &[experts, n, m], &why)?;
        (layer.intermediate, layer.tensors) = (m, names.into());
        Ok(())
    }

    fn latent(&self, layer: &mut MoeLayer) -> Result<()> {
        let (path, experts, n) = (layer.path.clone(), layer.experts, layer.hidden);
        let Some(config) = &self.latent else {
            return Err(self.wrong(format!(
                "`{path}` has latent experts, and config.json has no `rankmix_latent_moe`"
            )));
        };
        let Some(expert_to_group) = config.expert_to_group.get(&path) else {
            return Err(self.wrong(format!(
                "config.json: `rankmix_latent_moe.expert_to_group` has no `{path}`"
            )));
        };
        let (g, l) = (config.groups, config.latent);
        let why = format!("{experts} experts of width {n} in {g} groups of latent width {l}");
        if expert_to_group.len() != experts || !equal_groups(expert_to_group, g) {
            return Err(self.wrong(format!(
                "config.json: `rankmix_latent_moe.expert_to_group` of `{path}` does not fit {why}"
            )));
        }
        let first = latent_name(&path, "experts", 0, LATENT_EXPERT_PARTS[0]);
        let [m, _] = self.extents(&first, &why)?;
        for part in latent_parts(experts, g, [n, m, l], config.factored_down) {
            for name in part.names(&path) {
                self.expect(&name, &part.shape, &why)?;
                layer.tensors.push(name);
            }
        }
        let known: BTreeSet<&str> = layer.tensors().collect();
        let groups = format!("{path}.groups.");
        let mut of_groups = self.checkpoint.names_from(&groups);
        if let Some(stray) = of_groups.find(|name| !known.contains(name)) {
            let reason = format!("it belongs to none of the {why}");
            return Err(self.checkpoint.wrong(stray, &reason));
        }
        layer.intermediate = m;
        layer.latent = Some(LatentLayer {
            groups: g,
            latent: l,
            factored_down: config.factored_down,
            expert_to_group: expert_to_group.clone(),
        });
        Ok(())
    }

    fn shared(&self, layer: &mut MoeLayer) -> Result<()> {
        let (path, n) = (&layer.path, layer.hidden);
        let up = |name: &str| format!("{path}.{name}.up_proj.weight");
        let there = |name: &&&str| {
            let parts = ["gate_proj", "up_proj", "down_proj"];
            let whole = |part| format!("{path}.{name}.{part}.weight");
            parts
                .iter()
                .any(|part| self.checkpoint.entry(&whole(part)).is_some())
        };
        let Some(name) = SHARED.iter().find(there) else {
            return Ok(());
        };
        let why = format!("the shared expert of width {n}");
        let [s, _] = self.extents(&up(name), &why)?;
        for (part, shape) in [
            ("gate_proj", [s, n]),
            ("up_proj", [s, n]),
            ("down_proj", [n, s]),
        ] {
            self.expect(&format!("{path}.{name}.{part}.weight"), &shape, &why)?;
        }
        let gate = format!("{path}.{SHARED_GATE}");
        let sigmoid_gate = self.checkpoint.entry(&gate).is_some();
        if sigmoid_gate {
            self.expect(&gate, &[1, n], &why)?;
        }
        layer.shared_name = name;
        layer.shared = Some(SharedExpert {
            intermediate: s,
            sigmoid_gate,
        });
        Ok(())
    }
}
