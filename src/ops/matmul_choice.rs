//! Which kernel makes a product: the kernels there are, which can do a shape, and which is taken where nothing was measured.

use crate::device::{AdapterClass, Capabilities};
use crate::ops::Choice;
use crate::ops::candidates::{named_or_own, own_first};
use crate::ops::matmul::{MatMul, Sizes};
use crate::ops::matmul_kernels::Launched;
use crate::ops::subgroup_tile::subgroup_tiles;
use crate::ops::turns::are_taken;

/// The kernels of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// `matmul_subgroup.wgsl`: tiles by subgroups of eight, for lavapipe.
    Subgroup,
    /// `matmul_staged.wgsl`, tiles of 64 x 64 by way of workgroup memory.
    Staged64,
    /// The same in tiles of 32 x 32.
    Staged32,
    /// `matmul.wgsl`, 8 x 8 results an invocation straight from the operands.
    Direct8,
    /// The same with 4 x 8 results.
    Direct4,
    /// `matmul_split.wgsl`, k split over the invocations of a workgroup.
    Split,
    /// The same, k split over workgroups too, which a second launch adds up.
    SplitParts,
}

impl Kernel {
    const ALL: [Self; 7] = [
        Self::Subgroup,
        Self::Staged64,
        Self::Staged32,
        Self::Direct8,
        Self::Direct4,
        Self::Split,
        Self::SplitParts,
    ];

    /// The name in tables and in [`Capabilities::kernels`].
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Subgroup => "subgroup",
            Self::Staged64 => "staged 64",
            Self::Staged32 => "staged 32",
            Self::Direct8 => "direct 8",
            Self::Direct4 => "direct 4",
            Self::Split => "split",
            Self::SplitParts => "split in parts",
        }
    }

    /// Whether it can make the product there, and may be the fastest to do it.
    fn suits(self, sizes: &Sizes, capabilities: &Capabilities) -> bool {
        let in_parts = Split::in_parts(sizes);
        // What an invocation goes through in a turn at the least, where it goes through all of k.
        let per_turn = match self {
            Self::Subgroup | Self::Direct8 | Self::Direct4 => 4,
            Self::Staged64 | Self::Staged32 => 1,
            Self::Split => Split::whole(sizes).lanes[2],
            Self::SplitParts => in_parts.lanes[2] * in_parts.parts,
        };
        if !are_taken(sizes.k.div_ceil(per_turn), capabilities) {
            return false;
        }
        match self {
            Self::Subgroup => subgroup_tiles(capabilities),
            // It spills on real GPUs.
            Self::Direct8 => capabilities.class == AdapterClass::Software,
            Self::SplitParts => in_parts.parts > 1,
            Self::Staged64 | Self::Staged32 | Self::Direct4 | Self::Split => true,
        }
    }
}

/// Workgroups of tiles that keep a GPU busy: a discrete one has up to 170 processors, an integrated one about ten.
fn enough_tiles(class: AdapterClass) -> usize {
    match class {
        AdapterClass::Discrete => 96,
        AdapterClass::Integrated
        | AdapterClass::Virtual
        | AdapterClass::Other
        | AdapterClass::Software => 16,
    }
}

/// Where fewer invocations than this run, k is split further: a discrete GPU of middle size holds 40,000.
pub(crate) const ENOUGH_INVOCATIONS: usize = 16_384;
/// The invocations of a workgroup of `matmul_split.wgsl`.
const SPLIT_WORKGROUP: usize = 64;
/// More parts than this take longer to add up than they save.
const MOST_PARTS: usize = 64;
/// A product whose k is shorter is not worth splitting: a reduction takes as long as some twenty multiply-adds of every invocation.
pub(crate) const LONG_K: usize = 64;

/// How `matmul_split.wgsl` goes about a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    /// Rows that an invocation computes.
    pub(crate) rows: usize,
    /// Invocations of a workgroup along m, n and k.
    pub(crate) lanes: [usize; 3],
    /// The stretches of k that different workgroups take.
    pub(crate) parts: usize,
    /// The length of a stretch.
    pub(crate) part: usize,
}

impl Split {
    /// With k split over the invocations of a workgroup alone.
    pub(crate) fn whole(sizes: &Sizes) -> Self {
        let (rows, tiles) = Self::tiles(sizes);
        let fours = sizes.k.div_ceil(4);
        let mut along_k = 4;
        // Every invocation should go round its loop twice at least.
        while tiles * along_k < ENOUGH_INVOCATIONS
            && along_k < SPLIT_WORKGROUP
            && fours >= 8 * along_k
        {
            along_k *= 4;
        }
        let room = SPLIT_WORKGROUP / along_k;
        let across = sizes.n.div_ceil(4).next_power_of_two().min(room);
        Self {
            rows,
            lanes: [room / across, across, along_k],
            parts: 1,
            part: sizes.k,
        }
    }

    /// With k split over as many workgroups as fill a GPU, if it is long enough.
    pub(crate) fn in_parts(sizes: &Sizes) -> Self {
        let mut split = Self::whole(sizes);
        let along_k = split.lanes[2];
        let turns = sizes.k.div_ceil(4 * along_k);
        let (_, tiles) = Self::tiles(sizes);
        let wanted = ENOUGH_INVOCATIONS.div_ceil(tiles * along_k).max(2);
        let parts = wanted.min(MOST_PARTS).min(turns / 2).max(1);
        split.part = turns.div_ceil(parts) * 4 * along_k;
        split.parts = sizes.k.div_ceil(split.part);
        split
    }

    /// Rows that an invocation computes, and how many tiles that makes.
    fn tiles(sizes: &Sizes) -> (usize, usize) {
        let rows = sizes.m.next_power_of_two().min(4);
        (
            rows,
            sizes.m.div_ceil(rows) * sizes.n.div_ceil(4) * sizes.batch,
        )
    }
}

/// The kernel for a product of which no other was measured to be faster.
///
/// | adapter | shape | kernel | why |
/// |---|---|---|---|
/// | software, subgroups of 8 | k up to 260,000 | subgroup | loads are what costs on lavapipe: a subgroup shares them |
/// | other software | k up to 260,000 | direct 8 | barriers and workgroup memory gain nothing on a CPU |
/// | software | else | split in parts | llvmpipe leaves longer loops, see `ops/turns.rs` |
/// | GPU | k < 16 | direct 4 | a step of the staged kernel is 16 of k |
/// | GPU | enough tiles of 64 x 64 | staged 64 | 3 reads of workgroup memory for 32 multiply-adds |
/// | GPU | enough tiles of 32 x 32 | staged 32 | four times the workgroups |
/// | GPU | else, k < 64 | direct 4 | few results, little to add up |
/// | GPU | else | split | few results: the work is along k |
/// | GPU | else, fewer than half of 16,384 invocations | split in parts | a processor does not fill a GPU |
///
/// Tiles are counted only where both m and n are 32 at least: of a skinny result the tiles would be mostly empty.
fn default_kernel(product: &Launched, capabilities: &Capabilities) -> Kernel {
    let sizes = &product.first.1;
    let Sizes { batch, m, n, k, .. } = *sizes;
    if capabilities.class == AdapterClass::Software {
        let in_order = [Kernel::Subgroup, Kernel::Direct8];
        let mut in_order = in_order.into_iter();
        let short = in_order.find(|kernel| kernel.suits(sizes, capabilities));
        return short.unwrap_or(Kernel::SplitParts);
    }
    if k < 16 {
        return Kernel::Direct4;
    }
    let enough = |side: usize| {
        let tiles = m.div_ceil(side) * n.div_ceil(side) * batch;
        m.min(n) >= 32 && tiles >= enough_tiles(capabilities.class)
    };
    if enough(64) {
        Kernel::Staged64
    } else if enough(32) {
        Kernel::Staged32
    } else if k < LONG_K {
        Kernel::Direct4
    } else {
        let (_, tiles) = Split::tiles(sizes);
        let few = 2 * tiles * Split::whole(sizes).lanes[2] < ENOUGH_INVOCATIONS;
        if few && Kernel::SplitParts.suits(sizes, capabilities) {
            Kernel::SplitParts
        } else {
            Kernel::Split
        }
    }
}

/// What the choice depends on: `matmul nt 512 x 1024 x 64` is `[512, 64]` times `[1024, 64]` transposed. A batch stands in front; what follows
/// says which operand all entries share, how long the k of a second product is, and whether there is a bias or a base.
fn key(product: &Launched) -> String {
    let transposes = |options: MatMul| {
        let letter = |transposed: bool| if transposed { 't' } else { 'n' };
        [letter(options.transpose_a), letter(options.transpose_b)]
    };
    let (options, sizes) = product.first;
    let Sizes { batch, m, n, k, .. } = sizes;
    let mut key = String::from("matmul ");
    key.extend(transposes(options));
    if sizes.a_batched || sizes.b_batched {
        key += &format!(" {batch} of");
    }
    key += &format!(" {m} x {n} x {k}");
    match (sizes.a_batched, sizes.b_batched) {
        (false, true) => key += " left shared",
        (true, false) => key += " right shared",
        (true, true) | (false, false) => {}
    }
    if let Some((options, sizes)) = product.second {
        key += " + ";
        key.extend(transposes(options));
        key += &format!(" {}", sizes.k);
    }
    if product.bias.is_some() {
        key += " with bias";
    }
    if product.accumulate {
        key += " onto";
    }
    key
}

/// The kernels that can make a product, the default first.
fn candidates(product: &Launched, capabilities: &Capabilities) -> impl Iterator<Item = Kernel> {
    let own = default_kernel(product, capabilities);
    own_first(own, Kernel::ALL, |kernel| {
        kernel.suits(&product.first.1, capabilities)
    })
}

pub(crate) fn choice(product: &Launched, capabilities: &Capabilities) -> Choice {
    Choice {
        key: key(product),
        kernels: candidates(product, capabilities)
            .map(Kernel::name)
            .collect(),
    }
}

/// The kernel that the capabilities name for the product, if it is a candidate, or else the default.
pub(crate) fn chosen(product: &Launched, capabilities: &Capabilities) -> Kernel {
    named_or_own(
        default_kernel(product, capabilities),
        candidates(product, capabilities),
        Kernel::name,
        || key(product),
        capabilities,
    )
}

#[cfg(test)]
mod tests {
    use super::{Kernel, Split, choice, default_kernel};
    use crate::device::{AdapterClass, Capabilities};
    use crate::ops::matmul::{MatMul, Sizes};
    use crate::ops::matmul_kernels::Launched;

    fn product([m, n, k]: [usize; 3]) -> Launched {
        let sizes = Sizes {
            batch: 1,
            m,
            n,
            k,
            a_batched: false,
            b_batched: false,
        };
        let options = MatMul {
            transpose_b: true,
            ..MatMul::default()
        };
        Launched {
            first: (options, sizes),
            second: None,
            bias: None,
            accumulate: false,
        }
    }

    #[test]
    fn the_table_is_followed() {
        use AdapterClass::{Discrete, Integrated, Software};
        for (class, sizes, kernel) in [
            (Software, [512, 1024, 1024], Kernel::Direct8),
            (Discrete, [512, 1024, 1024], Kernel::Staged64),
            (Discrete, [512, 1024, 16], Kernel::Staged64),
            (Discrete, [512, 1024, 8], Kernel::Direct4),
            (Discrete, [512, 256, 1024], Kernel::Staged32),
            (Integrated, [512, 256, 1024], Kernel::Staged64),
            (Discrete, [64, 64, 48], Kernel::Direct4),
            (Discrete, [512, 16, 1024], Kernel::Split),
            (Discrete, [1, 1024, 1024], Kernel::Split),
            (Discrete, [16, 16, 4096], Kernel::SplitParts),
            (Software, [512, 1024, 260_001], Kernel::SplitParts),
            (Discrete, [512, 1024, 260_001], Kernel::Staged64),
        ] {
            let found = default_kernel(&product(sizes), &Capabilities::of_class(class));
            assert_eq!(found, kernel, "{class:?} {sizes:?}");
        }
    }

    #[test]
    fn the_parts_of_k_are_all_of_it_once() {
        for k in [1, 63, 64, 100, 1000, 1024, 4097] {
            for m in [1, 2, 5, 64] {
                let sizes = product([m, 12, k]).first.1;
                for split in [Split::whole(&sizes), Split::in_parts(&sizes)] {
                    let Split {
                        lanes, parts, part, ..
                    } = split;
                    assert_eq!(lanes.iter().product::<usize>(), 64, "{split:?}");
                    assert!((parts - 1) * part < k && k <= parts * part, "{split:?}");
                    assert!(parts == 1 || part % (4 * lanes[2]) == 0, "{split:?}");
                }
            }
        }
    }

    #[test]
    fn the_key_says_what_the_choice_depends_on() {
        let mut launched = product([512, 1024, 64]);
        launched.accumulate = true;
        launched.bias = Some(2);
        let choice = choice(&launched, &Capabilities::of_class(AdapterClass::Discrete));
        assert_eq!(choice.key, "matmul nt 512 x 1024 x 64 with bias onto");
        assert_eq!(choice.kernels[0], Kernel::Staged64.name());
        launched.first.1.batch = 3;
        launched.first.1.a_batched = true;
        launched.second = Some((MatMul::default(), launched.first.1));
        let choice = super::choice(&launched, &Capabilities::of_class(AdapterClass::Discrete));
        assert_eq!(
            choice.key,
            "matmul nt 3 of 512 x 1024 x 64 right shared + nn 64 with bias onto"
        );
    }
}
