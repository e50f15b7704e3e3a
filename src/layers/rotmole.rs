//! RotMoLE (arXiv 2605.25565): LoRA experts with a top-k gate and a second, rotation gate.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::graph::{Graph, Init, Value};
use crate::layers::{AdapterOptions, Linear, MoeLora, RoutedOutput, Routing};
use crate::ops::{Layout, Rotation};

/// What the rotation gate looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateInput {
    /// The layer's input.
    #[default]
    Input,
    /// The expert's latent `A_j x`.
    Latent,
}

/// `y = x Wᵀ + s Σ_j g_j B_j R(p_j) A_j x` with `p_j = V_j h`: the latent of each chosen expert is rotated by an amount that depends on the
/// token. Parameters as [`MoeLora`], and `NAME.rotation_gate` `[experts, numbers, d_in or rank]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RotMole {
    /// The mixture without the rotation.
    pub mixture: MoeLora,
    /// The kind of rotation.
    pub rotation: Rotation,
    /// What the rotation gate looks at.
    pub gate_input: GateInput,
}

impl RotMole {
    /// RotMoLE on a linear layer, with rotations in planes that depend on the layer's input.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) as for [`MoeLora::new`], and if the rank is odd: planes pair coordinates up.
    pub fn new(base: Linear, options: AdapterOptions, routing: Routing) -> Result<Self> {
        Self::with_rotation(base, options, routing, Rotation::Planes, GateInput::Input)
    }

    /// RotMoLE with another kind of rotation, or with a gate that looks at the latent.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) as for [`MoeLora::new`], and if the rank does not suit the rotation.
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
        })
    }

    /// The output for `x` `[tokens, d_in]`. The rotation gate starts at zero, so that training starts as plain MoE-LoRA.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` is not `[tokens, d_in]`.
    pub fn forward(&self, graph: &mut Graph, x: Value) -> Result<RoutedOutput> {
        let (numbers, width) = self.gate_sizes()?;
        let name = format!("{}.rotation_gate", self.mixture.base.name);
        let gate = graph.parameter(
            &name,
            [self.mixture.routing.experts, numbers, width],
            Init::Zeros,
            true,
        )?;
        self.mixture.forward_with(graph, x, |graph, z, routed| {
            let h = match self.gate_input {
                GateInput::Input => x,
                GateInput::Latent => z,
            };
            let generator = graph.shrink(h, gate, Layout::OutIn, routed.segments)?;
            graph.rotate(self.rotation, z, generator)
        })
    }

    fn gate_sizes(&self) -> Result<(usize, usize)> {
        let rank = self.mixture.options.rank;
        let width = match self.gate_input {
            GateInput::Input => self.mixture.base.d_in,
            GateInput::Latent => rank,
        };
        Ok((self.rotation.numbers(rank)?, width))
    }

    /// How many elements the adapter trains.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if the rank was changed to one that does not suit the rotation.
    pub fn trainable_elements(&self) -> Result<usize> {
        let (numbers, width) = self.gate_sizes()?;
        Ok(self.mixture.trainable_elements() + self.mixture.routing.experts * numbers * width)
    }
}
