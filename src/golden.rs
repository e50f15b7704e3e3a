//! Golden cases: layers with known outputs and gradients, made in 64-bit floats by an independent implementation. A case is a
//! safetensors file; replaying it shows that a device and its driver compute what they should.

use std::path::Path;

use serde::Deserialize;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::{TensorFile, read_bytes};
use crate::graph::{Graph, ParameterStore, Precision, SessionOptions, Storage, Value};
use crate::layers::{
    AdapterOptions, CoMol, CoreRouting, FeedForward, GateInput, LatentMoe, Linear, Lora, Moe,
    MoeLora, RotMole, RoutedOutput, Routing,
};
use crate::ops::{Activation, Rotation};
use crate::tensor::{Tensor, TensorType};

/// The largest ‖got - want‖ / ‖want‖ that passes, for 32-bit kernels.
pub const NORM_TOLERANCE: f64 = 1e-5;
/// The largest max|got - want| / max|want| that passes.
pub const ELEMENT_TOLERANCE: f64 = 1e-4;

/// The two tolerances where parameters or activations are stored in 16 bits.
pub const HALF_TOLERANCES: (f64, f64) = (5e-3, 2e-2);

/// The layer's name in a graph; parameter `param.X` of the file is `layer.X`.
const LAYER: &str = "layer";

/// The layers that can be replayed.
const LAYERS: [&str; 6] = ["lora", "moe_lora", "rotmole", "comol", "moe", "latent_moe"];

/// The settings of a case, from the file's metadata.
#[derive(Clone, Debug, Deserialize)]
struct Config {
    tokens: usize,
    #[serde(default)]
    d_in: usize,
    #[serde(default)]
    d_out: usize,
    #[serde(default)]
    rank: usize,
    #[serde(default)]
    alpha: f32,
    #[serde(default)]
    experts: usize,
    #[serde(default)]
    top_k: usize,
    #[serde(default)]
    rotation: Rotation,
    #[serde(default)]
    gate_input: GateInput,
    #[serde(default)]
    core_router: bool,
    #[serde(default)]
    bounded: bool,
    #[serde(default)]
    hidden: usize,
    #[serde(default)]
    intermediate: usize,
    #[serde(default)]
    latent: usize,
    #[serde(default)]
    groups: usize,
    #[serde(default)]
    activation: Activation,
    #[serde(default)]
    factored_down: bool,
    #[serde(default)]
    balance_coef: f32,
    #[serde(default)]
    z_coef: f32,
}

impl Config {
    /// Width of the layer's input: `d_in` of an adapted linear layer, `hidden` of a feed-forward layer.
    fn input_width(&self) -> usize {
        if self.hidden > 0 {
            self.hidden
        } else {
            self.d_in
        }
    }
}

/// A golden case.
#[derive(Clone, Debug)]
pub struct GoldenCase {
    /// The file's name without its ending.
    pub name: String,
    /// `lora`, `moe_lora`, `rotmole`, `comol`, `moe` or `latent_moe`.
    pub layer: String,
    config: Config,
    file: TensorFile,
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// ‖got - want‖ / ‖want‖ of the output.
    pub output_error: f64,
    /// The largest such error of the gradients.
    pub gradient_error: f64,
    /// The gradient that has it.
    pub worst_gradient: String,
    /// Whether the experts chosen are those of the case, in their order; true for layers without routing.
    pub experts_equal: bool,
    /// Whether every tensor is within both tolerances.
    pub ok: bool,
}

/// The errors of one tensor: in norm, and of the largest element.
fn errors(got: &Tensor, want: &Tensor) -> (f64, f64) {
    let (got, want) = (got.to_f64(), want.to_f64());
    if got.len() != want.len() || got.iter().any(|x| !x.is_finite()) {
        return (f64::INFINITY, f64::INFINITY);
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let largest = |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).fold(0.0, f64::max);
    let difference = || got.iter().zip(&want).map(|(g, w)| g - w);
    let ratio = |difference: f64, size: f64| {
        if difference == 0.0 {
            0.0
        } else {
            difference / size
        }
    };
    (
        ratio(norm(&mut difference()), norm(&mut want.iter().copied())),
        ratio(
            largest(&mut difference()),
            largest(&mut want.iter().copied()),
        ),
    )
}

impl GoldenCase {
    /// Reads a case.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Format`] if it cannot be read or is not a golden case of a known layer.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bytes(path)?;
        Self::parse(&bytes, path)
    }

    /// Reads a case from a file's contents; `path` names it.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not a golden case of a known layer.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.to_owned(),
            reason,
        };
        let file = TensorFile::parse(bytes, path)?;
        let entry = |name: &str| {
            file.metadata
                .get(name)
                .cloned()
                .ok_or_else(|| wrong(format!("the metadata has no `{name}`: not a golden case")))
        };
        let layer = entry("layer")?;
        if !LAYERS.contains(&layer.as_str()) {
            return Err(wrong(format!(
                "the layer `{layer}` is unknown; {} can be replayed",
                LAYERS.join(", ")
            )));
        }
        let config: Config = serde_json::from_str(&entry("config")?)
            .map_err(|error| wrong(format!("the metadata's config: {error}")))?;
        for name in ["input.x", "grad.output", "expect.output"] {
            file.tensor(name)
                .map_err(|error| wrong(error.to_string()))?;
        }
        let name = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(Self {
            name,
            layer,
            config,
            file,
        })
    }

    /// Runs the case forward and backward on a device and compares everything that it expects.
    ///
    /// # Errors
    /// What building, compiling and running a session return.
    pub fn replay(&self, device: &Device) -> Result<Replay> {
        self.replay_stored(device, Precision::F32)
    }

    /// [`GoldenCase::replay`] with parameters and activations stored as `precision` says; with 16 bits the tolerances are
    /// [`HALF_TOLERANCES`].
    ///
    /// # Errors
    /// As [`GoldenCase::replay`].
    pub fn replay_stored(&self, device: &Device, precision: Precision) -> Result<Replay> {
        device.may_wait("GoldenCase::replay", "GoldenCase::replay_async")?;
        pollster::block_on(self.replay_with(device, precision, true))
    }

    /// [`GoldenCase::replay_stored`] for an async caller.
    ///
    /// # Errors
    /// As [`GoldenCase::replay`].
    pub async fn replay_async(&self, device: &Device, precision: Precision) -> Result<Replay> {
        self.replay_with(device, precision, false).await
    }

    async fn replay_with(
        &self,
        device: &Device,
        precision: Precision,
        block: bool,
    ) -> Result<Replay> {
        let mut graph = Graph::new();
        graph.set_precision(precision);
        let config = &self.config;
        let x = graph.input("x", TensorType::f32([config.tokens, config.input_width()]))?;
        let (output, routed) = self.build(&mut graph, x)?;
        let upstream = graph.constant(self.file.tensor("grad.output")?.clone())?;
        let mut seeds = vec![(output, upstream)];
        let mut expected = vec![("expect.output".to_owned(), output)];
        if let Some(routed) = routed {
            let balance = graph
                .balance_loss(routed.logits, routed.routed.experts())?
                .loss;
            let z = graph.z_loss(routed.logits)?;
            for (loss, coefficient) in [(balance, config.balance_coef), (z, config.z_coef)] {
                let coefficient = graph.constant(Tensor::scalar(coefficient))?;
                seeds.push((loss, coefficient));
            }
            // Both losses, side by side: [L_b, 0] + [0, L_z].
            let first = graph.constant(Tensor::f32([2], vec![1.0, 0.0])?)?;
            let second = graph.constant(Tensor::f32([2], vec![0.0, 1.0])?)?;
            let (first, second) = (graph.mul(first, balance)?, graph.mul(second, z)?);
            expected.push(("expect.aux".to_owned(), graph.add(first, second)?));
            expected.push(("expect.experts".to_owned(), routed.routed.experts()));
        }
        let store = ParameterStore::new(device);
        let mut wanted = vec![("expect.grad.input.x".to_owned(), x)];
        for (name, tensor) in &self.file.tensors {
            if let Some(parameter) = name.strip_prefix("param.") {
                let full = format!("{LAYER}.{parameter}");
                let spec = graph.parameters().iter().find(|spec| spec.name == full);
                let storage = spec.map_or(Storage::F32, |spec| spec.storage);
                store.insert_as(&full, tensor, storage)?;
                wanted.push((
                    format!("expect.grad.param.{parameter}"),
                    graph.named(&full)?,
                ));
            }
        }
        let values: Vec<Value> = wanted.iter().map(|&(_, value)| value).collect();
        let gradients = graph.gradients_from(&seeds, &values)?;
        expected.extend(wanted.into_iter().map(|(name, _)| name).zip(gradients));
        expected.retain(|(name, _)| self.file.tensors.contains_key(name));
        for (_, value) in &expected {
            graph.output(*value)?;
        }
        let mut session = if block {
            graph.compile(&store)?
        } else {
            let options = SessionOptions::default();
            graph.compile_async(&store, options).await?
        };
        session.poison()?;
        session.write(x, self.file.tensor("input.x")?)?;
        let values: Vec<Value> = expected.iter().map(|&(_, value)| value).collect();
        let results = if block {
            session.run_reading(&values)?
        } else {
            session.run_reading_async(&values).await?
        };
        let tolerances = if precision == Precision::F32 {
            (NORM_TOLERANCE, ELEMENT_TOLERANCE)
        } else {
            HALF_TOLERANCES
        };
        self.compare(&expected, &results, tolerances)
    }

    fn build(&self, graph: &mut Graph, x: Value) -> Result<(Value, Option<RoutedOutput>)> {
        let config = &self.config;
        let routing = Routing::new(config.experts, config.top_k);
        let expert = FeedForward {
            activation: config.activation,
            gated: ["param.gate", "param.gate_expert"]
                .iter()
                .any(|name| self.file.tensors.contains_key(*name)),
            ..FeedForward::new(config.hidden, config.intermediate)
        };
        match self.layer.as_str() {
            "moe" => {
                let routed = Moe::new(LAYER, expert, routing)?.forward(graph, x)?;
                return Ok((routed.output, Some(routed)));
            }
            "latent_moe" => {
                let mut layer =
                    LatentMoe::new(LAYER, expert, config.latent, config.groups, routing)?;
                layer.factored_down = config.factored_down;
                let routed = layer.forward(graph, x)?;
                return Ok((routed.output, Some(routed)));
            }
            _ => {}
        }
        let base = Linear::new(LAYER, config.d_in, config.d_out);
        let options = AdapterOptions::new(config.rank, config.alpha);
        let routed = match self.layer.as_str() {
            "lora" => return Ok((Lora::new(base, options)?.forward(graph, x)?, None)),
            "moe_lora" => MoeLora::new(base, options, routing)?.forward(graph, x)?,
            "comol" => {
                let output = self.comol(base, options)?.forward(graph, x)?;
                return Ok((output.output, output.routed_output()));
            }
            _ => {
                let mut layer = RotMole::with_rotation(
                    base,
                    options,
                    routing,
                    config.rotation,
                    config.gate_input,
                )?;
                layer.bounded = config.bounded;
                layer.forward(graph, x)?
            }
        };
        Ok((routed.output, Some(routed)))
    }

    /// A case without `top_k` has a dense gate.
    fn comol(&self, base: Linear, options: AdapterOptions) -> Result<CoMol> {
        let layer = CoMol::new(base, options, self.config.experts)?;
        let layer = layer.with_routing(if self.config.core_router {
            CoreRouting::Core
        } else {
            CoreRouting::Raw
        });
        match self.config.top_k {
            0 => Ok(layer),
            top_k => layer.with_top_k(top_k),
        }
    }

    fn compare(
        &self,
        expected: &[(String, Value)],
        results: &[Tensor],
        (norm_tolerance, element_tolerance): (f64, f64),
    ) -> Result<Replay> {
        let mut replay = Replay {
            output_error: 0.0,
            gradient_error: 0.0,
            worst_gradient: String::new(),
            experts_equal: true,
            ok: true,
        };
        for ((name, _), got) in expected.iter().zip(results) {
            let want = self.file.tensor(name)?;
            if name == "expect.experts" {
                replay.experts_equal = got.as_i32() == want.as_i32();
                replay.ok &= replay.experts_equal;
                continue;
            }
            let (norm, element) = errors(got, want);
            replay.ok &= norm <= norm_tolerance && element <= element_tolerance;
            if name == "expect.output" {
                replay.output_error = norm;
            } else if norm > replay.gradient_error || replay.worst_gradient.is_empty() {
                replay.gradient_error = norm;
                replay.worst_gradient = name.trim_start_matches("expect.").to_owned();
            }
        }
        Ok(replay)
    }
}
