//! What an operation has to do at the least, whatever its kernels do: the ground for saying how far a kernel is from a device's limits.

use crate::ops::{AliasKind, LaunchTypes, Op};

/// The least that an operation has to do. Every addition, multiplication, division and function (square root, exponential, sine)
/// of floats counts as one FLOP, a multiply-add as two; integer arithmetic and comparisons do not count. Nobody
/// knows before a run which rows a gather picks: where they decide, pairs count as if all belonged to experts, and as many different rows
/// are read as there can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Operations on floats.
    pub flops: u64,
    /// How many elements of each input must be read.
    pub reads: Vec<u64>,
    /// How many elements of each output must be written.
    pub writes: Vec<u64>,
}

impl Work {
    /// No arithmetic; every input read once and every output written once.
    #[must_use]
    pub fn moving(io: LaunchTypes<'_>) -> Self {
        let elements = |types: &[crate::TensorType]| -> Vec<u64> {
            types.iter().map(|ty| ty.elements() as u64).collect()
        };
        Self {
            flops: 0,
            reads: elements(io.inputs),
            writes: elements(io.outputs),
        }
    }

    /// [`Work::moving`], less what an operation passes on without touching it.
    pub(crate) fn moving_in(op: &(impl Op + ?Sized), io: LaunchTypes<'_>) -> Self {
        let mut work = Self::moving(io);
        for alias in op.aliases() {
            if alias.kind == AliasKind::View {
                work.reads[alias.input] = 0;
                work.writes[alias.output] = 0;
            }
        }
        work
    }

    /// The same with so many operations on floats.
    #[must_use]
    pub fn with_flops(mut self, flops: usize) -> Self {
        self.flops = flops as u64;
        self
    }

    /// The same with so many elements of an input read.
    #[must_use]
    pub fn reading(mut self, input: usize, elements: usize) -> Self {
        if let Some(reads) = self.reads.get_mut(input) {
            *reads = elements as u64;
        }
        self
    }
}
