//! Rotations of latents (section 3 of the mathematics): the kinds there are, and what they share.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::rotate_cayley::Cayley;
use crate::ops::rotate_givens::Givens;
use crate::ops::rotate_planes::Planes;
use crate::ops::{HostIo, LaunchTypes, Op, Real, dims_f32, expect_count, expect_f32};
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
            return Err(Error::setting(
                "rank",
                rank,
                "a rotation needs at least 2 dimensions",
            ));
        }
        match self {
            Self::Planes if rank % 2 == 1 => Err(Error::setting(
                "rank",
                rank,
                "planes rotate pairs of coordinates: the rank must be even",
            )),
            Self::Planes => Ok(rank / 2),
            Self::Givens | Self::Cayley => Ok(rank * (rank - 1) / 2),
        }
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
        let known = Self::ALL
            .into_iter()
            .find(|rotation| rotation.name() == text);
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
            Rotation::Planes => self.apply1(Rotate(Planes), &[z, generator]),
            Rotation::Givens => self.apply1(Rotate(Givens), &[z, generator]),
            Rotation::Cayley => self.apply1(Rotate(Cayley), &[z, generator]),
        }
    }
}

/// A row of a rotation and the gradient that reached it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowGradient<'a, R> {
    pub(crate) generator: &'a [R],
    /// The row's result, and its gradient.
    pub(crate) y: &'a [R],
    pub(crate) dy: &'a [R],
    /// What was rotated; empty for kinds that do not keep it.
    pub(crate) z: &'a [R],
}

/// What is particular to a kind of rotation: its kernels, and its work on one row on the CPU.
pub(crate) trait Kind: fmt::Debug + Clone + Copy + Send + Sync + 'static {
    const ROTATION: Rotation;
    /// The names of the two operations.
    const NAMES: [&'static str; 2];
    /// The largest rank that the kernels can do.
    const MAX_RANK: usize;
    /// Whether the gradient needs what was rotated, beside the result.
    const KEEPS_INPUT: bool;

    fn rotate<R: Real>(z: &[R], generator: &[R], y: &mut [R]);
    fn gradient<R: Real>(row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]);
    /// The kernel and how many workgroups it needs. Inputs: z, generator. Output: y.
    fn forward(rows: usize, rank: usize) -> (Launch, usize);
    /// Inputs: y, generator, dy, and z if it is kept. Outputs: dz, the gradient of the generator.
    fn backward(rows: usize, rank: usize) -> (Launch, usize);
}

/// Checks `[rows, rank]` latents and `[rows, numbers]` generators, and returns rows and rank.
fn sizes<K: Kind>(op: &'static str, inputs: &[TensorType]) -> Result<[usize; 2]> {
    let [rows, rank] = dims_f32(op, "the latents", &inputs[0])?;
    expect_f32(
        op,
        "the generators",
        &inputs[1],
        &[rows, K::ROTATION.numbers(rank)?],
    )?;
    if rank > K::MAX_RANK {
        let thing = format!("a {} rotation", K::ROTATION);
        return Err(Error::Limit {
            thing,
            needed: rank as u64,
            limit: K::MAX_RANK as u64,
            unit: "dimensions",
        });
    }
    Ok([rows, rank])
}

/// Inputs: z `[rows, rank]`, generator `[rows, numbers]`.
#[derive(Clone, Copy, Debug)]
struct Rotate<K>(K);

/// Inputs: y, generator, dy, and z if the kind keeps it. Outputs: dz, the gradient of the generator.
#[derive(Clone, Copy, Debug)]
struct RotateBackward<K>(K);

impl<K: Kind> Rotate<K> {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (rank, numbers) = (
            io.input_type(0)?.shape.last(),
            io.input_type(1)?.shape.last(),
        );
        let (z, generator) = (io.floats(0)?, io.floats(1)?);
        let y = io.floats_out(0)?;
        let rows = y
            .par_chunks_mut(rank)
            .zip(z.par_chunks(rank))
            .zip(generator.par_chunks(numbers));
        rows.for_each(|((y, z), generator)| K::rotate(z, generator, y));
        Ok(())
    }
}

impl<K: Kind> Op for Rotate<K> {
    fn name(&self) -> &'static str {
        K::NAMES[0]
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        sizes::<K>(self.name(), inputs)?;
        Ok(vec![inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = context.gradient(0) else {
            return Ok(());
        };
        let kept = K::KEEPS_INPUT.then(|| context.input(0));
        let inputs: Vec<Value> = [context.output(0), context.input(1), dy]
            .into_iter()
            .chain(kept)
            .collect();
        let gradients = context.graph.apply(RotateBackward(self.0), &inputs)?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            if context.wants(input) {
                context.add(input, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = sizes::<K>(self.name(), io.inputs)?;
        let (launch, groups) = K::forward(rows, rank);
        Ok(launch.folded(groups, capabilities)?.into())
    }

    host_reference!();
}

impl<K: Kind> RotateBackward<K> {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (rank, numbers) = (
            io.input_type(0)?.shape.last(),
            io.input_type(1)?.shape.last(),
        );
        let (y, generator, dy) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let z = if K::KEEPS_INPUT { io.floats(3)? } else { &[] };
        let (dz, d_generator) = (io.floats_out(0)?, io.floats_out(1)?);
        let outputs = dz
            .par_chunks_mut(rank)
            .zip(d_generator.par_chunks_mut(numbers))
            .enumerate();
        outputs.for_each(|(row, (dz, d_generator))| {
            let here = row * rank..(row + 1) * rank;
            let row = RowGradient {
                generator: &generator[row * numbers..(row + 1) * numbers],
                y: &y[here.clone()],
                dy: &dy[here.clone()],
                z: z.get(here).unwrap_or_default(),
            };
            K::gradient(row, dz, d_generator);
        });
        Ok(())
    }
}

impl<K: Kind> Op for RotateBackward<K> {
    fn name(&self) -> &'static str {
        K::NAMES[1]
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3 + usize::from(K::KEEPS_INPUT))?;
        sizes::<K>(self.name(), inputs)?;
        for ty in &inputs[2..] {
            expect_f32(self.name(), "latents and gradients", ty, inputs[0].dims())?;
        }
        Ok(inputs[..2].to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = sizes::<K>(self.name(), io.inputs)?;
        let (launch, groups) = K::backward(rows, rank);
        Ok(launch.folded(groups, capabilities)?.into())
    }

    host_reference!();
}
