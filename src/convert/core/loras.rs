//! Several LoRA adapters as the experts of one CoMoL adapter.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde_json::Value;

use crate::convert::core::bases::{Change, Cores, cores, matrix};
use crate::convert::core::{CoreExpertReport, CoreLayerReport, CoreReport};
use crate::error::{Error, Result};
use crate::formats::{LoraPair, MixtureAdapter, PeftAdapter, Target};
use crate::layers::{AdapterOptions, CoMol, Linear, Routing};
use crate::tensor::{Tensor, TensorType};

/// Where the router of the new layers sends the tokens until it is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CoreRouter {
    /// A router of zeros looking at the latent under a dense gate: every token takes all experts equally, which is the mean of the LoRAs.
    #[default]
    Uniform,
    /// A router of zeros, one expert a token, and a selection bias of 1 for this expert: every token takes it alone, with the gate 1. Another is
    /// chosen by writing another bias.
    Expert(usize),
}

/// How LoRAs become core experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraOptions {
    /// The rank of the CoMoL layers, at most; `None`: for each layer the smallest that loses nothing.
    pub rank: Option<usize>,
    /// What the router starts as.
    pub router: CoreRouter,
    /// Leaves out what CoMoL has no place for (embeddings, biases of B, modules trained whole), where else it is an error.
    pub leave_out: bool,
}

/// What a pair is called in the report, and the pair.
type Source<'a> = (&'a str, Option<&'a LoraPair>);

/// Makes several LoRA adapters, each with a name for the report, the experts of one CoMoL adapter, in their order: on every linear layer that one of
/// them adapts. The factor in front of each goes into its core; alpha is the rank, so that the layer's own is 1. `on_layer` is called as layers are done.
///
/// # Errors
/// [`Error::Setting`] if there is no adapter, one adapts the experts of a fused tensor, or has what CoMoL has not, unless it is to be left out, or the
/// router's expert is none of them; [`Error::Shape`] if adapters disagree in the widths of a layer; [`Error::NotFinite`] if a matrix is not finite.
pub fn loras_to_comol(
    adapters: &[(String, PeftAdapter)],
    options: &LoraOptions,
    on_layer: impl Fn(&CoreLayerReport) + Sync,
) -> Result<(MixtureAdapter, CoreReport)> {
    check(adapters.len(), options)?;
    let left_out = left_out(adapters)?;
    if let Some(name) = left_out.first().filter(|_| !options.leave_out) {
        return Err(Error::setting(
            "adapter",
            name,
            "CoMoL adapts linear layers and has no biases; ask for such things to be left out",
        ));
    }
    let linear = |pair: &&LoraPair| pair.target == Target::Linear;
    let mut paths = BTreeSet::new();
    for (_, adapter) in adapters {
        let pairs = adapter.pairs.iter();
        paths.extend(pairs.filter(|(_, pair)| linear(pair)).map(|(path, _)| path));
    }
    let paths: Vec<&String> = paths.into_iter().collect();
    if paths.is_empty() {
        return Err(Error::setting(
            "adapters",
            adapters.len(),
            "none adapts a linear layer",
        ));
    }
    let converted = paths.par_iter().map(|path| {
        let sources: Vec<Source<'_>> = adapters
            .iter()
            .map(|(name, adapter)| (name.as_str(), adapter.pairs.get(*path).filter(linear)))
            .collect();
        let converted = convert(path, &sources, options)?;
        on_layer(&converted.2);
        Ok(converted)
    });
    let converted: Vec<_> = converted.collect::<Result<_>>()?;
    let mut result = MixtureAdapter::default();
    let mut layers = Vec::new();
    for (layer, tensors, report) in converted {
        let name = layer.base.name.clone();
        for (parameter, tensor) in tensors {
            result.tensors.insert(format!("{name}.{parameter}"), tensor);
        }
        result.layers.insert(name, layer.into());
        layers.push(report);
    }
    let key = "base_model_name_or_path";
    let bases = adapters.iter();
    let bases = bases.filter_map(|(_, adapter)| adapter.config.others.get(key)?.as_str());
    let bases: BTreeSet<&str> = bases.collect();
    if let (1, Some(base)) = (bases.len(), bases.first()) {
        result.others.insert(key.to_owned(), Value::from(*base));
    }
    let bases = bases.into_iter().map(ToOwned::to_owned).collect();
    Ok((result, CoreReport::new(layers, left_out, bases)))
}

fn check(adapters: usize, options: &LoraOptions) -> Result<()> {
    if adapters == 0 {
        return Err(Error::setting(
            "adapters",
            adapters,
            "there must be at least 1",
        ));
    }
    if options.rank == Some(0) {
        return Err(Error::setting(
            "rank",
            0,
            "an adapter needs at least rank 1",
        ));
    }
    match options.router {
        CoreRouter::Expert(expert) if expert >= adapters => Err(Error::setting(
            "expert",
            expert,
            format!("there are {adapters}, counted from 0"),
        )),
        _ => Ok(()),
    }
}

/// What CoMoL has no place for.
fn left_out(adapters: &[(String, PeftAdapter)]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (
        adapter,
        PeftAdapter {
            config,
            pairs,
            others,
        },
    ) in adapters
    {
        if config.has_fused_experts() {
            let reason = "it adapts the experts of a fused tensor, which CoMoL cannot hold";
            return Err(Error::setting("adapter", adapter, reason));
        }
        for (path, pair) in pairs {
            if pair.target == Target::Embedding {
                names.push(format!("{adapter}: the embedding `{path}`"));
            }
            if pair.bias.is_some() {
                names.push(format!("{adapter}: the bias of `{path}`"));
            }
        }
        names.extend(others.keys().map(|name| format!("{adapter}: `{name}`")));
    }
    Ok(names)
}

/// The change that a pair of matrices makes, once it is known to be finite.
pub(super) fn change(path: &str, a: &Tensor, b: &Tensor, scale: f64) -> Result<Change> {
    for tensor in [a, b] {
        if let Some(element) = tensor.first_not_finite() {
            return Err(Error::NotFinite {
                value: format!("a matrix of `{path}`"),
                element,
            });
        }
    }
    let (&[rank, _], &[_, other]) = (a.shape().dims(), b.shape().dims()) else {
        return Err(unfit(path, a, b));
    };
    if rank != other {
        return Err(unfit(path, a, b));
    }
    let (a, b) = (
        matrix(&a.to_f64(), rank),
        matrix(&b.to_f64(), b.shape().rows()),
    );
    Change::new(a.as_ref(), b.as_ref(), scale)
}

fn unfit(path: &str, a: &Tensor, b: &Tensor) -> Error {
    Error::shape(
        "conversion",
        format!(
            "`{path}`: {} and {} are not [rank, d_in] and [d_out, rank]",
            a.shape(),
            b.shape()
        ),
    )
}

/// The layer, its tensors by the ends of their names, and the report.
type Converted = (CoMol, Vec<(&'static str, Tensor)>, CoreLayerReport);

fn convert(path: &str, sources: &[Source<'_>], options: &LoraOptions) -> Result<Converted> {
    let widths = |pair: &LoraPair| [pair.a.shape().last(), pair.b.shape().rows()];
    let mut known: Option<(&str, [usize; 2])> = None;
    for (name, pair) in sources {
        let Some(pair) = pair else { continue };
        let own = widths(pair);
        match known {
            Some((first, known)) if known != own => {
                return Err(Error::shape(
                    "loras_to_comol",
                    format!(
                        "`{path}` is {known:?} wide, in and out, in {first} and {own:?} in {name}"
                    ),
                ));
            }
            _ => known = Some((name, own)),
        }
    }
    let widths = known.map_or([0, 0], |(_, widths)| widths);
    let changes = sources.iter().map(|(_, pair)| {
        pair.map(|pair| change(path, &pair.a, &pair.b, pair.scale))
            .transpose()
    });
    let changes = changes.collect::<Result<Vec<_>>>()?;
    let cores = cores(&changes, widths, options.rank)?;
    let (experts, rank) = (sources.len(), cores.a.shape().rows());
    let base = Linear::new(path, widths[0], widths[1]);
    let layer = CoMol::new(base, AdapterOptions::new(rank, rank as f32), experts)?;
    let router = Tensor::zeros(&TensorType::f32([experts, rank]));
    let mut tensors = vec![("router", router)];
    let layer = match options.router {
        CoreRouter::Uniform => layer,
        CoreRouter::Expert(chosen) => {
            let mut bias = vec![0.0; experts];
            bias[chosen] = 1.0;
            tensors.push(("router_bias", Tensor::f32([experts], bias)?));
            layer.with_sparse_gate(Routing {
                selection_bias: true,
                ..Routing::new(experts, 1)
            })?
        }
    };
    let report_of = |(name, pair): &Source<'_>, error: &f64| CoreExpertReport {
        source: (*name).to_owned(),
        rank: pair.map_or(0, LoraPair::rank),
        scale: pair.map_or(0.0, |pair| pair.scale),
        relative_error: *error,
    };
    let reports = sources.iter().zip(&cores.errors);
    let reports = reports.map(|(source, error)| report_of(source, error));
    let report = report(path, widths, &cores, reports.collect());
    tensors.extend([
        ("lora_a", cores.a),
        ("lora_b", cores.b),
        ("core", cores.core),
    ]);
    let elements = tensors.iter().map(|(_, tensor)| tensor.shape().elements());
    let report = CoreLayerReport {
        elements_after: elements.sum(),
        ..report
    };
    Ok((layer, tensors, report))
}

/// The report on a layer, all but the elements of gates and of the result.
pub(super) fn report(
    path: &str,
    [d_in, d_out]: [usize; 2],
    cores: &Cores,
    experts: Vec<CoreExpertReport>,
) -> CoreLayerReport {
    let summed_ranks = experts.iter().map(|expert| expert.rank).sum();
    CoreLayerReport {
        layer: path.to_owned(),
        d_in,
        d_out,
        summed_ranks,
        independent_a: cores.independent[0],
        independent_b: cores.independent[1],
        rank: cores.a.shape().rows(),
        kept_energy_a: cores.kept_energy[0],
        kept_energy_b: cores.kept_energy[1],
        lossless: false,
        router_error: None,
        elements_before: summed_ranks * (d_in + d_out),
        elements_after: 0,
        experts,
    }
    .with_verdict()
}
