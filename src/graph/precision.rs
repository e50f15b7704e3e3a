//! What the floats of a graph are stored in. Arithmetic is f32 whatever the storage.

use crate::graph::Graph;

/// How a value's floats are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 4 bytes each.
    #[default]
    F32,
    /// 2 bytes each (IEEE 754 binary16). Kernels widen what they read, accumulate in f32, and round what they write.
    F16,
}

impl Storage {
    /// The size of one float in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// What a graph stores its parameters and its computed values in.
///
/// Kept in f32 whatever is asked for: inputs and constants, router parameters and everything between a router's logits and its
/// gates, generators of rotations, losses and other reductions, gradients of parameters, and the optimiser's state with its master
/// copy of each parameter stored in 16 bits. Integers are not touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Precision {
    /// Of parameters declared from now on.
    pub parameters: Storage,
    /// Of the results of operations added from now on, gradients of activations included.
    pub activations: Storage,
}

impl Precision {
    /// Everything in 32 bits.
    pub const F32: Self = Self {
        parameters: Storage::F32,
        activations: Storage::F32,
    };

    /// Parameters and activations in 16 bits.
    pub const F16: Self = Self {
        parameters: Storage::F16,
        activations: Storage::F16,
    };
}

impl Graph {
    /// Sets what parameters and computed values are stored in from now on; f32 at the start. Gradients are
    /// stored as the graph's precision says when they are built.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// What parameters and computed values are stored in at present.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Builds a part of the graph whose parameters and values, and their gradients, stay in f32 whatever the precision: for what
    /// 11 bits are not enough for, such as a router's logits.
    pub fn in_f32<T>(&mut self, build: impl FnOnce(&mut Self) -> T) -> T {
        let precision = std::mem::replace(&mut self.precision, Precision::F32);
        let built = build(self);
        self.precision = precision;
        built
    }
}
