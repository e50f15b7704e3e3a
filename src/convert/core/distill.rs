//! A mixture of LoRA experts as a CoMoL adapter.

use rayon::prelude::*;
use serde_json::Value;

use crate::convert::core::bases::{cores, matrix, product};
use crate::convert::core::loras::{change, report};
use crate::convert::core::{CoreExpertReport, CoreLayerReport, CoreReport};
use crate::error::{Error, Result};
use crate::formats::{MixtureAdapter, MixtureLayer};
use crate::layers::{AdapterOptions, CoMol, CoreRouting, GateInput};
use crate::tensor::Tensor;

/// How the experts of a mixture become core experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DistillOptions {
    /// The rank of the CoMoL layers, at most; `None`: for each layer the smallest that loses nothing.
    pub rank: Option<usize>,
    /// [`CoreRouting::Raw`] keeps the router as it is, and with it every choice; [`CoreRouting::Core`] projects it onto what the latent
    /// holds of the input, and the report says how much of it that was.
    pub routing: CoreRouting,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self {
            rank: None,
            routing: CoreRouting::Raw,
        }
    }
}

/// Makes CoMoL of the layers of a MoE-LoRA adapter: the experts by projection, the routing as it was. With the router as it is and a basis as wide as the ranks
/// together the layers compute what they did. Static rotations of a RotMoLE adapter are part of the cores; of others it is the experts at rotation 0,
/// without the rotation gate, as the report says: a rotation that depends on the token has no place in a core.
///
/// # Errors
/// As [`MixtureAdapter::check`]; [`Error::Setting`] if a layer is CoMoL already, or its gate is that of a block; [`Error::NotFinite`] if a
/// matrix is not finite.
pub fn moe_lora_to_comol(
    mixture: &MixtureAdapter,
    options: &DistillOptions,
    on_layer: impl Fn(&CoreLayerReport) + Sync,
) -> Result<(MixtureAdapter, CoreReport)> {
    mixture.check()?;
    if options.rank == Some(0) {
        return Err(Error::setting(
            "rank",
            0,
            "an adapter needs at least rank 1",
        ));
    }
    if let Some((layer, block)) = mixture.blocks.first_key_value() {
        let reason = format!("the gate of `{layer}` chooses for all of this block together");
        return Err(Error::setting("gate_of", block, reason));
    }
    let layers: Vec<_> = mixture.layers.iter().collect();
    let converted = layers.par_iter().map(|(path, layer)| {
        let converted = convert(path, layer, mixture, options)?;
        on_layer(&converted.2);
        Ok(converted)
    });
    let converted: Vec<_> = converted.collect::<Result<_>>()?;
    let mut result = MixtureAdapter {
        others: mixture.others.clone(),
        ..MixtureAdapter::default()
    };
    let mut reports = Vec::new();
    for (layer, tensors, report) in converted {
        let name = layer.base.name.clone();
        for (parameter, tensor) in tensors {
            result.tensors.insert(format!("{name}.{parameter}"), tensor);
        }
        result.layers.insert(name, layer.into());
        reports.push(report);
    }
    let rotated = |(_, layer): &(&String, &MixtureLayer)| matches!(layer, MixtureLayer::RotMole(layer) if layer.gate_input != GateInput::Static);
    let rotated = layers.iter().filter(|layer| rotated(layer));
    let left_out = rotated.map(|(path, _)| format!("the rotation of `{path}`"));
    let base = mixture.others.get("base_model_name_or_path");
    let base = base.and_then(Value::as_str).map(ToOwned::to_owned);
    let report = CoreReport::new(reports, left_out.collect(), base.into_iter().collect());
    Ok((result, report))
}

/// The layer, its tensors by the ends of their names, and the report.
type Converted = (CoMol, Vec<(&'static str, Tensor)>, CoreLayerReport);

fn convert(
    path: &str,
    layer: &MixtureLayer,
    mixture: &MixtureAdapter,
    options: &DistillOptions,
) -> Result<Converted> {
    let lora = match layer {
        MixtureLayer::MoeLora(lora) => lora,
        MixtureLayer::RotMole(rotated) => &rotated.mixture,
        MixtureLayer::CoMol(_) => {
            return Err(Error::setting("layer", path, "it is CoMoL already"));
        }
    };
    let tensor = |parameter: &str| &mixture.tensors[&format!("{path}.{parameter}")];
    let (d_in, d_out) = (lora.base.d_in, lora.base.d_out);
    let (experts, rank) = (lora.routing.experts, lora.options.rank);
    let scale = f64::from(lora.options.factor());
    let changes = (0..experts).map(|expert| {
        let [a, b] = mixture.expert_matrices(path, layer, expert)?;
        change(path, &a, &b, scale).map(Some)
    });
    let changes = changes.collect::<Result<Vec<_>>>()?;
    let cores = cores(&changes, [d_in, d_out], options.rank)?;
    let reports = cores.errors.iter().enumerate();
    let reports = reports.map(|(expert, error)| CoreExpertReport {
        source: format!("expert {expert}"),
        rank,
        scale,
        relative_error: *error,
    });
    let mut report = report(path, [d_in, d_out], &cores, reports.collect());
    let router = tensor("router");
    report.elements_before += router.shape().elements();
    let router = match options.routing {
        CoreRouting::Raw => router.clone(),
        CoreRouting::Core => {
            let (projected, error) = project(router, &cores.a)?;
            report.router_error = Some(error);
            projected
        }
    };
    let width = cores.a.shape().rows();
    let adapter_options =
        AdapterOptions::new(width, width as f32).with_dropout(lora.options.dropout);
    let comol = CoMol::new(lora.base.clone(), adapter_options, experts)?
        .with_routing(options.routing)
        .with_sparse_gate(lora.routing)?;
    let mut tensors = vec![
        ("router", router),
        ("lora_a", cores.a),
        ("lora_b", cores.b),
        ("core", cores.core),
    ];
    if lora.routing.selection_bias {
        tensors.push(("router_bias", tensor("router_bias").clone()));
    }
    let elements = tensors.iter().map(|(_, tensor)| tensor.shape().elements());
    report.elements_after = elements.sum();
    Ok((comol, tensors, report))
}

/// The router for the latent `A x`, whose rows are orthonormal, and ‖W - W' A‖ / ‖W‖.
fn project(router: &Tensor, a: &Tensor) -> Result<(Tensor, f64)> {
    let (experts, rank) = (router.shape().rows(), a.shape().rows());
    let whole = matrix(&router.to_f64(), experts);
    let a = matrix(&a.to_f64(), rank);
    let projected = product(whole.as_ref(), a.transpose());
    let back = product(projected.as_ref(), a.as_ref());
    let norm = whole.norm_l2();
    let lost = (&whole - &back).norm_l2();
    let rows = (0..experts).flat_map(|i| (0..rank).map(move |j| (i, j)));
    let elements = rows.map(|at| projected[at] as f32).collect();
    let error = if norm == 0.0 { 0.0 } else { lost / norm };
    Ok((Tensor::f32([experts, rank], elements)?, error))
}
