//! Rotations of latents (section 3 of the mathematics): the kinds there are, and what they share.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::ops::rotate_cayley::RotateCayley;
use crate::ops::rotate_givens::RotateGivens;
use crate::ops::rotate_planes::RotatePlanes;
use crate::ops::{dims_f32, expect_count, expect_f32};
use crate::tensor::TensorType;

/// How numbers become an orthogonal matrix R(p), r x r. p = 0 is the identity, bit for bit; lengths are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rotation {
    /// One angle for each pair of neighbouring coordinates (2i, 2i + 1): r / 2 numbers, r even.
    #[default]
    Planes,
    /// A chain of plane rotations over all pairs of coordinates, one after another: r (r - 1) / 2 numbers.
    Givens,
    /// (I - Q)⁻¹ (I + Q) with Q skew-symmetric: r (r - 1) / 2 numbers.
    Cayley,
}

impl Rotation {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Planes, Self::Givens, Self::Cayley];

    /// The name in files and on command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Planes => "planes",
            Self::Givens => "givens",
            Self::Cayley => "cayley",
        }
    }

    /// How many numbers a rotation in `rank` dimensions takes.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rank is less than 2, or odd for planes.
    pub fn numbers(self, rank: usize) -> Result<usize> {
        if rank < 2 {
            return Err(Error::setting("rank", rank, "a rotation needs at least 2 dimensions"));
        }
        match self {
            Self::Planes if rank % 2 == 1 => {
                Err(Error::setting("rank", rank, "planes rotate pairs of coordinates: the rank must be even"))
            }
            Self::Planes => Ok(rank / 2),
            Self::Givens | Self::Cayley => Ok(rank * (rank - 1) / 2),
        }
    }

    /// Checks `[rows, rank]` latents and `[rows, numbers]` generators, and returns rows and rank.
    pub(crate) fn sizes(self, op: &'static str, inputs: &[TensorType]) -> Result<[usize; 2]> {
        let [rows, rank] = dims_f32(op, "the latents", &inputs[0])?;
        expect_f32(op, "the generators", &inputs[1], &[rows, self.numbers(rank)?])?;
        Ok([rows, rank])
    }

    /// The types of a backward operation: as many further inputs of the latents' type as there are, outputs (dz, dp).
    pub(crate) fn backward_types(
        self,
        op: &'static str,
        inputs: &[TensorType],
        count: usize,
    ) -> Result<Vec<TensorType>> {
        expect_count(op, inputs, count)?;
        self.sizes(op, inputs)?;
        for ty in &inputs[2..] {
            expect_f32(op, "the outputs and their gradients", ty, inputs[0].dims())?;
        }
        Ok(inputs[..2].to_vec())
    }
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Rotation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|rotation| rotation.name() == text);
        known.ok_or_else(|| Error::setting("rotation", text, "there are planes, givens and cayley"))
    }
}

impl Graph {
    /// Rotates each row of `z` (`[rows, rank]`) by its row of `generator` (`[rows, numbers]`).
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Setting`] if the rank does not suit the rotation.
    pub fn rotate(&mut self, rotation: Rotation, z: Value, generator: Value) -> Result<Value> {
        match rotation {
            Rotation::Planes => self.apply1(RotatePlanes, &[z, generator]),
            Rotation::Givens => self.apply1(RotateGivens, &[z, generator]),
            Rotation::Cayley => self.apply1(RotateCayley, &[z, generator]),
        }
    }
}
