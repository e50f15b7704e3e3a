//! The options of a layer in `adapter_config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::mixture::adapter::check_path;
use crate::formats::mixture::layer::{MixtureKind, MixtureLayer};
use crate::formats::peft::MOST_RANK;
use crate::layers::{
    AdapterOptions, AdapterScale, Capacity, CoMol, CoreRouting, GateInput, Linear, MoeLora,
    RotMole, Routing,
};
use crate::ops::{BalanceForm, CoreMix, DropPolicy, Rotation, Score};

/// The largest number of experts that is believed: beyond it a file is damaged.
const MOST_EXPERTS: usize = 1 << 16;

/// All keys of a layer's options, as they stand in the file.
pub(crate) const KEYS: [&str; 15] = [
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "num_experts",
    "base_bias",
    "routing",
    "rotation",
    "rotation_gate_input",
    "rotation_bounded",
    "core_routing",
    "core_mix",
    "shared_a",
    "shared_b",
    "gate_of",
];

/// Keys of the whole file that have a meaning here.
const OF_THE_FILE: [&str; 4] = ["peft_type", "format", "format_version", "layer_options"];

/// Whether a key has a meaning in this layout, so that no key of others can be named so.
pub(crate) fn is_taken(key: &str) -> bool {
    KEYS.contains(&key) || OF_THE_FILE.contains(&key)
}

/// Those of [`KEYS`] that are names, and say nothing for other layers.
const NAMES: [&str; 3] = ["shared_a", "shared_b", "gate_of"];

/// The options of one layer. What another kind of mixture has is null or left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerConfig {
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    lora_dropout: f32,
    num_experts: usize,
    #[serde(default)]
    base_bias: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    routing: Option<RoutingConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation: Option<Rotation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation_gate_input: Option<GateInput>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation_bounded: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    core_routing: Option<CoreRouting>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    core_mix: Option<CoreMix>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared_a: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared_b: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_of: Option<String>,
}

/// [`Routing`] without the number of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoutingConfig {
    top_k: usize,
    #[serde(default = "renormalize")]
    renormalize: bool,
    #[serde(default)]
    score: Score,
    #[serde(default = "scale")]
    scale: f32,
    #[serde(default)]
    selection_bias: bool,
    #[serde(default)]
    jitter: f32,
    #[serde(default)]
    capacity: Option<CapacityConfig>,
    #[serde(default)]
    balance: BalanceForm,
}

fn renormalize() -> bool {
    true
}

fn scale() -> f32 {
    1.0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapacityConfig {
    factor: f64,
    #[serde(default)]
    drop: DropPolicy,
}

impl From<&Routing> for RoutingConfig {
    fn from(routing: &Routing) -> Self {
        Self {
            top_k: routing.top_k,
            renormalize: routing.renormalize,
            score: routing.score,
            scale: routing.scale,
            selection_bias: routing.selection_bias,
            jitter: routing.jitter,
            capacity: routing
                .capacity
                .map(|Capacity { factor, drop }| CapacityConfig { factor, drop }),
            balance: routing.balance,
        }
    }
}

impl RoutingConfig {
    fn routing(&self, experts: usize) -> Routing {
        Routing {
            experts,
            top_k: self.top_k,
            renormalize: self.renormalize,
            score: self.score,
            scale: self.scale,
            selection_bias: self.selection_bias,
            jitter: self.jitter,
            capacity: self.capacity.as_ref().map(|capacity| Capacity {
                factor: capacity.factor,
                drop: capacity.drop,
            }),
            balance: self.balance,
        }
    }
}

impl LayerConfig {
    /// The options of a layer, and the block that its gate belongs to if it is not its own.
    pub(crate) fn of(layer: &MixtureLayer, gate_of: Option<&String>) -> Self {
        let options = layer.options();
        let mut config = Self {
            r: options.rank,
            lora_alpha: options.alpha,
            use_rslora: options.scale == AdapterScale::RankStabilized,
            lora_dropout: options.dropout,
            num_experts: layer.experts(),
            base_bias: layer.base().bias,
            routing: layer.routing().map(RoutingConfig::from),
            rotation: None,
            rotation_gate_input: None,
            rotation_bounded: None,
            core_routing: None,
            core_mix: None,
            shared_a: None,
            shared_b: None,
            gate_of: gate_of.cloned(),
        };
        match layer {
            MixtureLayer::MoeLora(_) => {}
            MixtureLayer::RotMole(layer) => {
                config.rotation = Some(layer.rotation);
                config.rotation_gate_input = Some(layer.gate_input);
                config.rotation_bounded = Some(layer.bounded);
            }
            MixtureLayer::CoMol(layer) => {
                config.core_routing = Some(layer.routing);
                config.core_mix = Some(layer.mix);
                config.shared_a.clone_from(&layer.shared_a);
                config.shared_b.clone_from(&layer.shared_b);
            }
        }
        config
    }

    /// Where the matrices lie whose widths are the layer's, by the ends of their names in a file: of A, and of B.
    pub(crate) fn width_tensors(&self, kind: MixtureKind, path: &str) -> [String; 2] {
        match kind {
            MixtureKind::CoMol => {
                let a = self.shared_a.as_deref().unwrap_or(path);
                let b = self.shared_b.as_deref().unwrap_or(path);
                [format!("{a}.lora_A.weight"), format!("{b}.lora_B.weight")]
            }
            MixtureKind::MoeLora | MixtureKind::RotMole => {
                ["A", "B"].map(|matrix| format!("{path}.experts.0.lora_{matrix}.weight"))
            }
        }
    }

    /// The block whose gate this is.
    pub(crate) fn gate_of(&self) -> Option<&String> {
        self.gate_of.as_ref()
    }

    /// The names under which matrices are shared.
    fn shared_names(&self) -> impl Iterator<Item = &String> {
        [&self.shared_a, &self.shared_b].into_iter().flatten()
    }

    /// The layer with these options.
    pub(crate) fn layer(
        &self,
        kind: MixtureKind,
        path: &str,
        [d_in, d_out]: [usize; 2],
    ) -> Result<MixtureLayer> {
        let mut base = Linear::new(path, d_in, d_out);
        base.bias = self.base_bias;
        let options = AdapterOptions {
            rank: self.r,
            alpha: self.lora_alpha,
            scale: if self.use_rslora {
                AdapterScale::RankStabilized
            } else {
                AdapterScale::Standard
            },
            dropout: self.lora_dropout,
        };
        let routing = self.routing.as_ref();
        let routing = routing.map(|routing| routing.routing(self.num_experts));
        let needs_routing = || Error::setting("routing", "null", format!("{kind} needs one"));
        Ok(match kind {
            MixtureKind::MoeLora => {
                MoeLora::new(base, options, routing.ok_or_else(needs_routing)?)?.into()
            }
            MixtureKind::RotMole => {
                let layer = RotMole::with_rotation(
                    base,
                    options,
                    routing.ok_or_else(needs_routing)?,
                    self.rotation.unwrap_or_default(),
                    self.rotation_gate_input.unwrap_or_default(),
                )?;
                if self.rotation_bounded == Some(true) {
                    layer.with_bounded_generator().into()
                } else {
                    layer.into()
                }
            }
            MixtureKind::CoMol => {
                let mut layer = CoMol::new(base, options, self.num_experts)?
                    .with_routing(self.core_routing.unwrap_or_default())
                    .with_mix(self.core_mix.unwrap_or_default());
                if let Some(routing) = routing {
                    layer = layer.with_sparse_gate(routing)?;
                }
                layer.shared_a.clone_from(&self.shared_a);
                layer.shared_b.clone_from(&self.shared_b);
                layer.into()
            }
        })
    }

    /// Refuses names that are none, sizes that no file has, and options of another kind of mixture; [`LayerConfig::layer`] refuses the rest. Both are
    /// asked before a layer is written and when it is read.
    pub(crate) fn check(&self, kind: MixtureKind, path: &str) -> Result<()> {
        let names = [
            ("layer", Some(path)),
            ("shared_a", self.shared_a.as_deref()),
            ("shared_b", self.shared_b.as_deref()),
            ("gate_of", self.gate_of.as_deref()),
        ];
        for (setting, name) in names {
            if let Some(name) = name {
                check_path(name).map_err(|reason| Error::setting(setting, name, reason))?;
            }
        }
        let limit = |setting, value: usize, most: usize| {
            if value <= most {
                return Ok(());
            }
            let reason = format!("at most {most} are believed in a file");
            Err(Error::setting(setting, value, reason))
        };
        limit("r", self.r, MOST_RANK as usize)?;
        limit("num_experts", self.num_experts, MOST_EXPERTS)?;
        let rotation = self.rotation.is_some()
            || self.rotation_gate_input.is_some()
            || self.rotation_bounded.is_some();
        let core = self.core_routing.is_some()
            || self.core_mix.is_some()
            || self.shared_names().next().is_some();
        for (setting, there, of) in [
            ("rotation", rotation, MixtureKind::RotMole),
            (
                "core_routing, core_mix, shared_a or shared_b",
                core,
                MixtureKind::CoMol,
            ),
            ("gate_of", self.gate_of.is_some(), MixtureKind::MoeLora),
        ] {
            if there && kind != of {
                return Err(Error::setting(
                    setting,
                    "set",
                    format!("{kind} has none, {of} has"),
                ));
            }
        }
        Ok(())
    }
}

fn object<T: Serialize>(value: &T) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(object)) => object,
        // The options are plain data: numbers, truth values, names.
        _ => Map::new(),
    }
}

/// Splits the options of layers into those of the first, without names, and for each layer what differs from them.
pub(crate) fn split(
    configs: &[(&String, LayerConfig)],
) -> (Map<String, Value>, Map<String, Value>) {
    let mut common: Option<Map<String, Value>> = None;
    let mut layers = Map::new();
    for (path, config) in configs {
        let own = object(config);
        let common = common.get_or_insert_with(|| {
            let mut common = own.clone();
            common.retain(|key, _| !NAMES.contains(&key.as_str()));
            common
        });
        let mut differences = Map::new();
        for key in KEYS {
            let value = own.get(key).unwrap_or(&Value::Null);
            if common.get(key).unwrap_or(&Value::Null) != value {
                differences.insert(key.to_owned(), value.clone());
            }
        }
        if !differences.is_empty() {
            layers.insert((*path).clone(), Value::Object(differences));
        }
    }
    (common.unwrap_or_default(), layers)
}

/// The options of a layer: those of all with its own over them.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn join(
    common: &Map<String, Value>,
    own: Option<&Map<String, Value>>,
) -> Result<LayerConfig, String> {
    let mut object = common.clone();
    for (key, value) in own.into_iter().flatten() {
        object.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(object)).map_err(|error| error.to_string())
}
