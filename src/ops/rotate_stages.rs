//! Plane rotations in stages, the butterfly and the brick wall: the pairs of a stage have no coordinate in common and turn at once.

use crate::device::{Capabilities, Launch, Slot};
use crate::error::Result;
use crate::ops::rotate_givens::{WORKGROUP_WORDS, chain_gradient, rotate_chain};
use crate::ops::rotation::{Kind, RowGradient};
use crate::ops::spread::barrier_workgroup;
use crate::ops::{Real, Rotation, shader};

const WORKGROUP: usize = 64;

/// Which pairs of coordinates turn in which stage.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stages {
    Butterfly,
    BrickWall { layers: usize },
}

/// The pairs of one stage, as in `shaders/rotate_stages.wgsl`.
#[derive(Clone, Copy, Debug)]
struct Stage {
    first: usize,
    /// The partners are 2^shift apart.
    shift: usize,
    pairs: usize,
}

impl Stage {
    fn pair(self, number: usize) -> (usize, usize) {
        let a = self.first + number + (number >> self.shift << self.shift);
        (a, a + (1 << self.shift))
    }
}

impl Stages {
    fn count(self, rank: usize) -> usize {
        match self {
            Self::Butterfly => rank.next_power_of_two().ilog2() as usize,
            Self::BrickWall { layers } => layers,
        }
    }

    fn stage(self, number: usize, rank: usize) -> Stage {
        match self {
            Self::Butterfly => {
                // Blocks of 2 stride coordinates, the last of which may be cut off.
                let stride = 1 << number;
                let cut = rank % (2 * stride);
                Stage {
                    first: 0,
                    shift: number,
                    pairs: rank / (2 * stride) * stride + cut.saturating_sub(stride),
                }
            }
            Self::BrickWall { .. } => {
                let first = number % 2;
                Stage {
                    first,
                    shift: 0,
                    pairs: (rank - first) / 2,
                }
            }
        }
    }

    /// How many pairs all stages have together, `usize::MAX` if they are more than that. The rank is at least 2.
    pub(crate) fn numbers(self, rank: usize) -> usize {
        match self {
            Self::Butterfly => (0..self.count(rank))
                .map(|stage| self.stage(stage, rank).pairs)
                .fold(0, usize::saturating_add),
            Self::BrickWall { layers } => {
                let [even, odd] = [0, 1].map(|stage| self.stage(stage, rank).pairs);
                let even = layers.div_ceil(2).saturating_mul(even);
                even.saturating_add((layers / 2).saturating_mul(odd))
            }
        }
    }

    /// The pairs of coordinates, stage by stage.
    fn pairs(self, rank: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
        (0..self.count(rank)).flat_map(move |stage| {
            let stage = self.stage(stage, rank);
            (0..stage.pairs).map(move |number| stage.pair(number))
        })
    }

    fn launch(
        self,
        entry: &'static str,
        rank: usize,
        capabilities: &Capabilities,
    ) -> (Launch, usize) {
        let workgroup = barrier_workgroup(WORKGROUP, capabilities);
        // An invocation a pair: the lanes of a row have two coordinates each, as far as the workgroup goes.
        let lanes = rank.div_ceil(2).next_power_of_two().min(workgroup);
        let launch = Launch::new(shader!("rotate_stages", "cos_sin"), entry)
            .constant("WORKGROUP", workgroup as f64)
            .constant("LANES", lanes as f64)
            .constant("WORDS", rank.max(2 * workgroup) as f64)
            .constant("BRICK_WALL", matches!(self, Self::BrickWall { .. }));
        (launch, workgroup / lanes)
    }

    fn params(self, launch: Launch, rows: usize, rank: usize) -> Launch {
        launch
            .param(rows)
            .param(rank)
            .param(self.numbers(rank))
            .param(self.count(rank))
    }
}

impl Kind for Stages {
    /// Backward has a row of y and one of its gradient in workgroup memory.
    const MAX_RANK: usize = WORKGROUP_WORDS / 2;
    const KEEPS_INPUT: bool = false;

    fn rotation(self) -> Rotation {
        match self {
            Self::Butterfly => Rotation::Butterfly,
            Self::BrickWall { layers } => Rotation::BrickWall { layers },
        }
    }

    fn names(self) -> [&'static str; 2] {
        match self {
            Self::Butterfly => ["rotate_butterfly", "rotate_butterfly_backward"],
            Self::BrickWall { .. } => ["rotate_brick_wall", "rotate_brick_wall_backward"],
        }
    }

    fn rotate<R: Real>(self, z: &[R], generator: &[R], y: &mut [R]) {
        rotate_chain(self.pairs(z.len()), z, generator, y);
    }

    fn gradient<R: Real>(self, row: RowGradient<'_, R>, dz: &mut [R], d_generator: &mut [R]) {
        chain_gradient(self.pairs(row.y.len()), row, dz, d_generator);
    }

    fn forward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let (launch, rows_per_group) = self.launch("forward", rank, capabilities);
        let launch = launch
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .write(4, Slot::Output(0));
        self.params(launch, rows, rank)
            .folded(rows.div_ceil(rows_per_group), capabilities)
    }

    fn backward(self, rows: usize, rank: usize, capabilities: &Capabilities) -> Result<Launch> {
        let (launch, rows_per_group) = self.launch("backward", rank, capabilities);
        let launch = launch
            .read(1, Slot::Input(1))
            .read(2, Slot::Input(0))
            .read(3, Slot::Input(2))
            .write(4, Slot::Output(0))
            .write(5, Slot::Output(1));
        self.params(launch, rows, rank)
            .folded(rows.div_ceil(rows_per_group), capabilities)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pairs_are_those_of_the_definition() {
        for rank in 2..70 {
            let butterfly: Vec<_> = (0..usize::BITS)
                .map(|stage| 1_usize << stage)
                .take_while(|&stride| stride < rank)
                .flat_map(|stride| {
                    let firsts = (0..rank).filter(move |i| i & stride == 0 && i + stride < rank);
                    firsts.map(move |i| (i, i + stride))
                })
                .collect();
            assert_eq!(Stages::Butterfly.pairs(rank).collect::<Vec<_>>(), butterfly);
            assert_eq!(Stages::Butterfly.numbers(rank), butterfly.len());
            for layers in 1..6 {
                let wall = Stages::BrickWall { layers };
                let bricks: Vec<_> = (0..layers)
                    .flat_map(|layer| (layer % 2..rank - 1).step_by(2).map(|a| (a, a + 1)))
                    .collect();
                assert_eq!(wall.pairs(rank).collect::<Vec<_>>(), bricks);
                assert_eq!(wall.numbers(rank), bricks.len());
            }
        }
    }
}
