//! Which kernel makes a grouped shrink, with a rotation behind it or without: the kernels there are, which can do a shape, and which is taken
//! where nothing was measured.

use crate::device::{AdapterClass, Capabilities};
use crate::ops::candidates::{named_or_own, own_first};
use crate::ops::matmul_choice::{ENOUGH_INVOCATIONS, LONG_K, Split};
use crate::ops::segments::lanes;
use crate::ops::shrink::Sizes;
use crate::ops::subgroup_tile::subgroup_tiles;
use crate::ops::{Choice, matmul};

/// Pairs and outputs that one invocation computes, as in `shaders/shrink.wgsl` and `shaders/rotated_shrink.wgsl`.
pub(crate) const TILE: usize = 4;

/// The kernels of a grouped shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// `shrink_subgroup.wgsl`, `rotated_shrink_subgroup.wgsl`: tiles by subgroups of eight, for lavapipe.
    Subgroup,
    /// `forward` of `shrink.wgsl`, `rotated_shrink.wgsl`: 4 x 4 results an invocation.
    Direct,
    /// `split` of the same: `in` split over the invocations of a workgroup.
    Split,
}

impl Kernel {
    const ALL: [Self; 3] = [Self::Subgroup, Self::Direct, Self::Split];

    fn name(self) -> &'static str {
        match self {
            Self::Subgroup => "subgroup",
            Self::Direct => "direct",
            Self::Split => "split",
        }
    }
}

/// A grouped shrink whose kernel is to be chosen.
pub(crate) struct Grouped<'a> {
    /// The operation, and what else its kernels depend on: `shrink nt`.
    pub(crate) name: &'a str,
    pub(crate) sizes: &'a Sizes,
    /// The experts, and one more where pairs may have none.
    pub(crate) segments: usize,
}

impl Grouped<'_> {
    fn key(&self) -> String {
        let Sizes {
            pairs,
            share,
            out,
            input,
            experts,
        } = self.sizes;
        let mut key = format!("{} {pairs} x {out} x {input} by {experts}", self.name);
        if self.segments > *experts {
            key += " or none";
        }
        if *share > 1 {
            key += &format!(", {share} a row");
        }
        key
    }

    fn suits(&self, kernel: Kernel, capabilities: &Capabilities) -> bool {
        match kernel {
            Kernel::Subgroup => {
                let Sizes { out, input, .. } = self.sizes;
                subgroup_tiles(capabilities) && out.is_multiple_of(4) && input.is_multiple_of(4)
            }
            Kernel::Direct => true,
            // Fewer fours than invocations along `in` would leave some without work.
            Kernel::Split => self.sizes.input >= 16,
        }
    }

    /// The kernel of which no other was measured to be faster.
    ///
    /// | adapter | shape | kernel | why |
    /// |---|---|---|---|
    /// | software, subgroups of 8 | widths are multiples of 4 | subgroup | a subgroup shares what it loads |
    /// | other software | all | direct | barriers and workgroup memory gain nothing on a CPU |
    /// | GPU | in < 64, or 16,384 invocations without a split | direct | a GPU is busy, or there is little to add up |
    /// | GPU | else | split | few results: the work is along in |
    fn own(&self, capabilities: &Capabilities) -> Kernel {
        if capabilities.class == AdapterClass::Software {
            return if self.suits(Kernel::Subgroup, capabilities) {
                Kernel::Subgroup
            } else {
                Kernel::Direct
            };
        }
        let Sizes {
            pairs, out, input, ..
        } = self.sizes;
        let tiles = pairs.div_ceil(TILE) * out.div_ceil(TILE);
        if *input < LONG_K || tiles >= ENOUGH_INVOCATIONS {
            Kernel::Direct
        } else {
            Kernel::Split
        }
    }

    /// The kernels that can do it, the operation's own first.
    fn candidates(&self, capabilities: &Capabilities) -> impl Iterator<Item = Kernel> {
        own_first(self.own(capabilities), Kernel::ALL, |kernel| {
            self.suits(kernel, capabilities)
        })
    }

    pub(crate) fn choice(&self, capabilities: &Capabilities) -> Choice {
        Choice {
            key: self.key(),
            kernels: self.candidates(capabilities).map(Kernel::name).collect(),
        }
    }

    /// The kernel that the capabilities name, if it can do it, or else the operation's own.
    pub(crate) fn chosen(&self, capabilities: &Capabilities) -> Kernel {
        named_or_own(
            self.own(capabilities),
            self.candidates(capabilities),
            Kernel::name,
            || self.key(),
            capabilities,
        )
    }

    /// The invocations of a workgroup along the pairs, the outputs and `in`, which are 64.
    pub(crate) fn lanes(&self, kernel: Kernel) -> [usize; 3] {
        let Sizes {
            pairs, out, input, ..
        } = *self.sizes;
        if kernel != Kernel::Split {
            let (along_pairs, along_out) = lanes([pairs, self.segments, out], [TILE, TILE]);
            return [along_pairs, along_out, 1];
        }
        // As a product of as many rows as a segment has pairs, one for each segment.
        let product = matmul::Sizes {
            batch: self.segments,
            m: pairs.div_ceil(self.segments).max(TILE),
            n: out,
            k: input,
            a_batched: true,
            b_batched: true,
        };
        Split::whole(&product).lanes
    }
}

#[cfg(test)]
mod tests {
    use super::{Grouped, Kernel};
    use crate::device::{AdapterClass, Capabilities};
    use crate::ops::shrink::Sizes;

    fn sizes(pairs: usize, out: usize, input: usize) -> Sizes {
        Sizes {
            pairs,
            share: 2,
            experts: 8,
            out,
            input,
        }
    }

    #[test]
    fn the_table_is_followed() {
        use AdapterClass::{Discrete, Software};
        let [software, discrete] = [Software, Discrete].map(Capabilities::of_class);
        let lavapipe = Capabilities {
            subgroup_size: Some(8),
            ..software.clone()
        };
        for (capabilities, [pairs, out, input], kernel) in [
            (&lavapipe, [1024, 16, 1024], Kernel::Subgroup),
            (&lavapipe, [1024, 6, 1024], Kernel::Direct),
            (&software, [1024, 16, 1024], Kernel::Direct),
            (&discrete, [1024, 16, 1024], Kernel::Split),
            (&discrete, [1024, 16, 60], Kernel::Direct),
            (&discrete, [1024, 1024, 1024], Kernel::Direct),
        ] {
            let grouped = Grouped {
                name: "shrink nt",
                sizes: &sizes(pairs, out, input),
                segments: 8,
            };
            assert_eq!(grouped.chosen(capabilities), kernel, "{}", grouped.key());
            let [p, o, k] = grouped.lanes(kernel);
            if kernel == Kernel::Split {
                assert_eq!((p * o * k, o * 4), (64, 16), "{}", grouped.key());
                assert!(k >= 4, "nothing is split");
            }
        }
    }

    #[test]
    fn the_key_says_what_the_choice_depends_on() {
        let grouped = Grouped {
            name: "shrink nt",
            sizes: &sizes(1024, 16, 512),
            segments: 9,
        };
        assert_eq!(
            grouped
                .choice(&Capabilities::of_class(AdapterClass::Discrete))
                .key,
            "shrink nt 1024 x 16 x 512 by 8 or none, 2 a row"
        );
    }
}
