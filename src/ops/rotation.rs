//! Rotations of latents (section 3 of the mathematics): the kinds there are, and what they share.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Storage, Value};
use crate::host_reference;
use crate::ops::rotate_cayley::Cayley;
use crate::ops::rotate_givens::Givens;
use crate::ops::rotate_householder::Householder;
use crate::ops::rotate_planes::Planes;
use crate::ops::rotate_stages::Stages;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32};
use crate::tensor::TensorType;

/// How numbers become an orthogonal matrix R(p), r x r. p = 0 is the identity, bit for bit; lengths are kept. In files and on command
/// lines a rotation is its name, as it is printed: `planes`, `givens`, `cayley`, `butterfly`, `brick_wall:4`, `householder`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Rotation {
    /// One angle for each pair of neighbouring coordinates (2i, 2i + 1): r / 2 numbers, r even.
    #[default]
    Planes,
    /// A chain of plane rotations over all pairs of coordinates, one after another: r (r - 1) / 2 numbers.
    Givens,
    /// (I - Q)⁻¹ (I + Q) with Q skew-symmetric: r (r - 1) / 2 numbers. Lengths are kept to 3e-6 for ‖Q‖ up to 10; with entries of
    /// hundreds the system has no digits left in f32, with thousands it may give infinities. `RotMole::with_bounded_generator` keeps
    /// entries within ±π.
    Cayley,
    /// ⌈log₂ r⌉ stages of plane rotations: stage s turns the pairs (i, i + 2ˢ) where bit s of i is 0 and i + 2ˢ < r. Where r is a power of
    /// two, these are r / 2 log₂ r numbers, and every coordinate of the result depends on every coordinate of what is rotated; another
    /// rank has fewer pairs.
    Butterfly,
    /// Layers of plane rotations of neighbours: (0, 1), (2, 3) … in the first, (1, 2), (3, 4) … in the second, and so on in turn. About
    /// r / 2 numbers a layer; r layers have as many as a Givens chain.
    BrickWall {
        /// How many layers, at least 1.
        layers: usize,
    },
    /// H(u + v) H(u), a pair of reflections H(w) = I - 2 w wᵀ / wᵀw, with u = (1, …, 1) / √r + a: the numbers are a and v, 2 r of them. v = 0
    /// is the identity for every a. Where u or u + v is exactly 0, its reflection is left out.
    Householder,
}

/// The largest number of elements that a generator can have: no tensor has more.
const MAX_NUMBERS: usize = i32::MAX as usize;

impl Rotation {
    /// One of each kind, the brick wall with 4 layers.
    pub const ALL: [Self; 6] = [
        Self::Planes,
        Self::Givens,
        Self::Cayley,
        Self::Butterfly,
        Self::BrickWall { layers: 4 },
        Self::Householder,
    ];

    /// The name in files and on command lines, from which [`str::parse`] makes the rotation again.
    #[must_use]
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Self::Planes => "planes".into(),
            Self::Givens => "givens".into(),
            Self::Cayley => "cayley".into(),
            Self::Butterfly => "butterfly".into(),
            Self::BrickWall { layers } => format!("brick_wall:{layers}").into(),
            Self::Householder => "householder".into(),
        }
    }

    /// How many numbers a rotation in `rank` dimensions takes.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rank is less than 2, or odd for planes, or if a brick wall has no layers; [`Error::Limit`] if
    /// they are more than a tensor can hold.
    pub fn numbers(self, rank: usize) -> Result<usize> {
        if rank < 2 {
            return Err(Error::setting(
                "rank",
                rank,
                "a rotation needs at least 2 dimensions",
            ));
        }
        let numbers = match self {
            Self::Planes if rank % 2 == 1 => {
                return Err(Error::setting(
                    "rank",
                    rank,
                    "planes rotate pairs of coordinates: the rank must be even",
                ));
            }
            Self::BrickWall { layers: 0 } => {
                return Err(Error::setting(
                    "layers",
                    0,
                    "a brick wall needs at least 1 layer",
                ));
            }
            Self::Planes => rank / 2,
            Self::Givens | Self::Cayley => rank.saturating_mul(rank - 1) / 2,
            Self::Butterfly => Stages::Butterfly.numbers(rank),
            Self::BrickWall { layers } => Stages::BrickWall { layers }.numbers(rank),
            Self::Householder => rank.saturating_mul(2),
        };
        if numbers > MAX_NUMBERS {
            return Err(Error::Limit {
                thing: format!("a {self} rotation in {rank} dimensions"),
                needed: numbers as u64,
                limit: MAX_NUMBERS as u64,
                unit: "numbers",
            });
        }
        Ok(numbers)
    }

    /// FLOP that rotate a row in `rank` dimensions, and that make both gradients of it.
    ///
    /// A turn in a plane: sine, cosine, four products, two sums. Its gradient: the same of dy, and the angle's two products and difference;
    /// in a chain y is turned back too. Cayley: an elimination and its two substitutions, once each way; backward, the outer difference as
    /// well. Householder: three products along the rank for each factor, four for each reflection, seven for each direction's gradient.
    pub(crate) fn flops(self, rank: usize) -> Result<[usize; 2]> {
        let numbers = self.numbers(rank)?;
        Ok(match self {
            Self::Planes => [8 * numbers, 11 * numbers],
            Self::Givens | Self::Butterfly | Self::BrickWall { .. } => [8 * numbers, 17 * numbers],
            Self::Cayley => {
                // Column k of the elimination: a division and a multiply-add for each element below and right of it, and of z.
                let solve: usize = (0..rank)
                    .map(|left| left * (3 + 2 * left) + 2 * left + 1)
                    .sum();
                [solve + 2 * rank, solve + 4 * rank + 4 * numbers]
            }
            Self::Householder => [
                2 * rank + 4 * rank + 8 * rank,
                2 * rank + 4 * rank + 12 * rank + 14 * rank + rank,
            ],
        })
    }
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl FromStr for Rotation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || {
            Error::setting(
                "rotation",
                text,
                "there are planes, givens, cayley, butterfly, householder, and brick_wall:N for N layers",
            )
        };
        match text {
            "planes" => Ok(Self::Planes),
            "givens" => Ok(Self::Givens),
            "cayley" => Ok(Self::Cayley),
            "butterfly" => Ok(Self::Butterfly),
            "householder" => Ok(Self::Householder),
            _ => match text.strip_prefix("brick_wall:").map(str::parse) {
                Some(Ok(layers)) if layers > 0 => Ok(Self::BrickWall { layers }),
                _ => Err(unknown()),
            },
        }
    }
}

impl TryFrom<String> for Rotation {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Rotation> for String {
    fn from(rotation: Rotation) -> Self {
        rotation.name().into_owned()
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
            Rotation::Butterfly => self.apply1(Rotate(Stages::Butterfly), &[z, generator]),
            Rotation::BrickWall { layers } => {
                self.apply1(Rotate(Stages::BrickWall { layers }), &[z, generator])
            }
            Rotation::Householder => self.apply1(Rotate(Householder), &[z, generator]),
        }
    }
}

impl Graph {
    /// The gradients of what was rotated in planes and of the angles, from the result `y`. That of the angles stays in f32, as angles do.
    pub(crate) fn planes_backward(
        &mut self,
        y: Value,
        angles: Value,
        dy: Value,
    ) -> Result<[Value; 2]> {
        let gradients = self.apply(RotateBackward(Planes), &[y, angles, dy])?;
        self.values[gradients[1].index as usize].storage = Storage::F32;
        Ok([gradients[0], gradients[1]])
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
    /// The largest rank that the kernels can do.
    const MAX_RANK: usize;
    /// Whether the gradient needs what was rotated, beside the result.
    const KEEPS_INPUT: bool;

    fn rotation(self) -> Rotation;
    /// The names of the two operations.
    fn names(self) -> [&'static str; 2];
    fn rotate<R: Real>(self, z: &[R], generator: &[R], y: &mut [R]);
    fn gradient<R: Real>(self, row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]);
    /// Inputs: z, generator. Output: y.
    fn forward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch>;
    /// Inputs: y, generator, dy, and z if it is kept. Outputs: dz, the gradient of the generator.
    fn backward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch>;
}

/// Checks `[rows, rank]` latents and `[rows, numbers]` generators, and returns rows and rank.
fn sizes<K: Kind>(kind: K, op: &'static str, inputs: &[TensorType]) -> Result<[usize; 2]> {
    let [rows, rank] = dims_f32(op, "the latents", &inputs[0])?;
    expect_f32(
        op,
        "the generators",
        &inputs[1],
        &[rows, kind.rotation().numbers(rank)?],
    )?;
    if rank > K::MAX_RANK {
        let thing = format!("a {} rotation", kind.rotation());
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
        let kind = self.0;
        rows.for_each(|((y, z), generator)| kind.rotate(z, generator, y));
        Ok(())
    }
}

impl<K: Kind> Op for Rotate<K> {
    fn name(&self) -> &'static str {
        self.0.names()[0]
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [rows, rank] = sizes(self.0, self.name(), io.inputs)?;
        let [forward, _] = self.0.rotation().flops(rank)?;
        Ok(Work::moving(io).with_flops(rows * forward))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        sizes(self.0, self.name(), inputs)?;
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
        let [rows, rank] = sizes(self.0, self.name(), io.inputs)?;
        Ok(self.0.forward(rows, rank, capabilities)?.into())
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
        let kind = self.0;
        outputs.for_each(|(row, (dz, d_generator))| {
            let here = row * rank..(row + 1) * rank;
            let row = RowGradient {
                generator: &generator[row * numbers..(row + 1) * numbers],
                y: &y[here.clone()],
                dy: &dy[here.clone()],
                z: z.get(here).unwrap_or_default(),
            };
            kind.gradient(row, dz, d_generator);
        });
        Ok(())
    }
}

impl<K: Kind> Op for RotateBackward<K> {
    fn name(&self) -> &'static str {
        self.0.names()[1]
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [rows, rank] = sizes(self.0, self.name(), io.inputs)?;
        let [_, backward] = self.0.rotation().flops(rank)?;
        Ok(Work::moving(io).with_flops(rows * backward))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3 + usize::from(K::KEEPS_INPUT))?;
        sizes(self.0, self.name(), inputs)?;
        for ty in &inputs[2..] {
            expect_f32(self.name(), "latents and gradients", ty, inputs[0].dims())?;
        }
        Ok(inputs[..2].to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, rank] = sizes(self.0, self.name(), io.inputs)?;
        Ok(self.0.backward(rows, rank, capabilities)?.into())
    }

    host_reference!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_files_and_command_lines_hold() {
        let wide = Rotation::BrickWall { layers: 31 };
        for rotation in Rotation::ALL.into_iter().chain([wide]) {
            let name = rotation.to_string();
            assert_eq!(name.parse::<Rotation>().expect("its own name"), rotation);
            let json = serde_json::to_string(&rotation).expect("a name");
            assert_eq!(json, format!("\"{name}\""));
            assert_eq!(
                serde_json::from_str::<Rotation>(&json).expect("its own name"),
                rotation
            );
        }
        assert_eq!(wide.to_string(), "brick_wall:31");
        assert!(serde_json::from_str::<Rotation>("\"brick_wall:0\"").is_err());
    }
}
