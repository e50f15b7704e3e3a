//! RotMoLE (arXiv 2605.25565): LoRA experts with a top-k gate and a second, rotation gate.

use std::f32::consts::PI;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::graph::{Graph, Init, ParameterStore, Value};
use crate::layers::moe_lora::Latents;
use crate::layers::{AdapterOptions, Linear, MoeLora, RotatedLatents, RoutedOutput, Routing};
use crate::ops::{Layout, Rotation, Segments};
use crate::tensor::Tensor;

/// What the rotation gate looks at. In files and on command lines `input`, `latent` or `static`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateInput {
    /// The layer's input.
    #[default]
    Input,
    /// The expert's latent `A_j x`.
    Latent,
    /// Nothing: each expert has one rotation for all tokens.
    Static,
}

impl fmt::Display for GateInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Latent => "latent",
            Self::Static => "static",
        })
    }
}

impl FromStr for GateInput {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "input" => Ok(Self::Input),
            "latent" => Ok(Self::Latent),
            "static" => Ok(Self::Static),
            _ => Err(Error::setting(
                "gate input",
                text,
                "there are input, latent and static",
            )),
        }
    }
}

/// `y = x Wᵀ + s Σ_j g_j B_j R(p_j) A_j x` with `p_j = V_j h`: the latent of each chosen expert is rotated by an amount that depends on the
/// token. Parameters as [`MoeLora`], and `NAME.rotation_gate` `[experts, numbers, d_in or rank]`; for [`GateInput::Static`], where
/// `p_j` is itself the parameter, `NAME.rotation_generator` `[experts, numbers]` instead.
#[derive(Clone, Debug, PartialEq)]
pub struct RotMole {
    /// The mixture without the rotation.
    pub mixture: MoeLora,
    /// The kind of rotation.
    pub rotation: Rotation,
    /// What the rotation gate looks at.
    pub gate_input: GateInput,
    /// Whether π tanh `p_j` takes the place of `p_j`, so that each number is within ±π. For rotations made of angles that leaves every
    /// angle there is; for [`Rotation::Cayley`] and [`Rotation::Householder`] the same bound is on the entries of the generator.
    pub bounded: bool,
}

impl RotMole {
    /// RotMoLE on a linear layer, with rotations in planes that depend on the layer's input.
    ///
    /// # Errors
    /// [`Error::Setting`] as for [`MoeLora::new`], and if the rank is odd: planes pair coordinates up.
    pub fn new(base: Linear, options: AdapterOptions, routing: Routing) -> Result<Self> {
        Self::with_rotation(base, options, routing, Rotation::Planes, GateInput::Input)
    }

    /// RotMoLE with another kind of rotation, or with a gate that looks at the latent.
    ///
    /// # Errors
    /// [`Error::Setting`] as for [`MoeLora::new`], and if the rank does not suit the rotation.
    pub fn with_rotation(
        base: Linear,
        options: AdapterOptions,
        routing: Routing,
        rotation: Rotation,
        gate_input: GateInput,
    ) -> Result<Self> {
        rotation.numbers(options.rank)?;
        Ok(Self {
            mixture: MoeLora::new(base, options, routing)?,
            rotation,
            gate_input,
            bounded: false,
        })
    }

    /// The same with every number of the generator within ±π: see [`RotMole::bounded`].
    #[must_use]
    pub fn with_bounded_generator(mut self) -> Self {
        self.bounded = true;
        self
    }

    /// The output for `x` `[tokens, d_in]`. The rotation gate starts at zero, so that training starts as plain MoE-LoRA.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `[tokens, d_in]`; [`Error::Limit`] if the kernels of the rotation do not go up to the rank.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        let (name, dims) = self.gate()?;
        let name = format!("{}.{name}", self.mixture.base.name);
        let declare = |graph: &mut Graph| graph.parameter(&name, dims, Init::Zeros, true);
        // Angles need absolute accuracy, and may be many turns: what is computed of the gate stays in f32, static angles too.
        let gate = match self.gate_input {
            GateInput::Static => graph.in_f32(declare)?,
            GateInput::Input | GateInput::Latent => declare(graph)?,
        };
        let mut rotated = None;
        let output = self
            .mixture
            .forward_with(graph, x, |graph, latents, routed| {
                let latents = self.rotate(graph, x, latents, gate, routed.segments)?;
                rotated = Some(latents);
                Ok(latents.after)
            })?;
        Ok(RoutedOutput { rotated, ..output })
    }

    fn rotate(
        &self,
        graph: &mut Graph,
        x: Value,
        latents: Latents,
        gate: Value,
        segments: Segments,
    ) -> Result<RotatedLatents> {
        let before = latents.z;
        let one_kernel = self.rotation == Rotation::Planes
            && self.gate_input == GateInput::Input
            && !self.bounded
            && latents.input == x;
        if one_kernel {
            let [after, generator] = graph.rotated_shrink(x, latents.a, gate, segments)?;
            return Ok(RotatedLatents {
                before,
                after,
                generator,
            });
        }
        let h = match self.gate_input {
            GateInput::Input => x,
            GateInput::Latent => before,
            GateInput::Static => {
                let (generator, matrices) = graph.in_f32(|graph| {
                    let generator = self.bound(graph, gate)?;
                    Ok::<_, Error>((generator, self.matrices(graph, generator)?))
                })?;
                return Ok(RotatedLatents {
                    before,
                    after: graph.shrink(before, matrices, Layout::InOut, segments)?,
                    generator,
                });
            }
        };
        let generator = graph.in_f32(|graph| {
            let generator = graph.shrink(h, gate, Layout::OutIn, segments)?;
            self.bound(graph, generator)
        })?;
        Ok(RotatedLatents {
            before,
            after: graph.rotate(self.rotation, before, generator)?,
            generator,
        })
    }

    /// π tanh of the generator if it is to be bounded.
    fn bound(&self, graph: &mut Graph, generator: Value) -> Result<Value> {
        if !self.bounded {
            return Ok(generator);
        }
        let tanh = graph.tanh(generator)?;
        graph.scale(tanh, PI)
    }

    /// The experts' rotations as matrices `[experts, rank, rank]`, row i of which is `R e_i`: rank rows are rotated an expert, and not one
    /// a token.
    fn matrices(&self, graph: &mut Graph, generator: Value) -> Result<Value> {
        let (experts, rank) = (self.mixture.routing.experts, self.mixture.options.rank);
        let numbers = self.rotation.numbers(rank)?;
        // One row of the generator for each unit vector.
        let generator = graph.reshape(generator, [experts, 1, numbers])?;
        let zeros = graph.constant(Tensor::f32([rank, 1], vec![0.0; rank])?)?;
        let generator = graph.add(generator, zeros)?;
        let generator = graph.reshape(generator, [experts * rank, numbers])?;
        let unit = (0..experts * rank * rank)
            .map(|at| {
                if at / rank % rank == at % rank {
                    1.0
                } else {
                    0.0
                }
            })
            .collect();
        let unit = graph.constant(Tensor::f32([experts * rank, rank], unit)?)?;
        let rotated = graph.rotate(self.rotation, unit, generator)?;
        graph.reshape(rotated, [experts, rank, rank])
    }

    /// The experts' rotations by a static generator `[experts, numbers]`, as [`RotMole::matrices`] has them: `[experts, rank, rank]`, each Rᵀ.
    /// Computed on the host in 64 bits, whatever device the layer is for.
    pub(crate) fn static_rotations(&self, generator: &Tensor) -> Result<Tensor> {
        let mut graph = Graph::new();
        let generator = graph.constant(generator.clone())?;
        let generator = self.bound(&mut graph, generator)?;
        let matrices = self.matrices(&mut graph, generator)?;
        graph.output(matrices)?;
        let store = ParameterStore::new(&Device::reference());
        let mut read = graph.compile(&store)?.run_reading(&[matrices])?;
        Ok(read.remove(0))
    }

    /// The gate's parameter: what its name ends in, and its shape.
    fn gate(&self) -> Result<(&'static str, Vec<usize>)> {
        let (experts, rank) = (self.mixture.routing.experts, self.mixture.options.rank);
        let numbers = self.rotation.numbers(rank)?;
        Ok(match self.gate_input {
            GateInput::Input => (
                "rotation_gate",
                vec![experts, numbers, self.mixture.base.d_in],
            ),
            GateInput::Latent => ("rotation_gate", vec![experts, numbers, rank]),
            GateInput::Static => ("rotation_generator", vec![experts, numbers]),
        })
    }

    /// How many elements the adapter trains.
    ///
    /// # Errors
    /// As [`Rotation::numbers`], if the rank was changed to one that does not suit the rotation.
    pub fn trainable_elements(&self) -> Result<usize> {
        let (_, dims) = self.gate()?;
        Ok(self.mixture.trainable_elements() + dims.iter().product::<usize>())
    }
}
