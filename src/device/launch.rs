//! A launch is data: which shader, which entry point, what is bound, how many workgroups. It can be printed, tested and
//! costed without a GPU.

use crate::device::Capabilities;
use crate::error::{Error, Result};

/// A WGSL module: a name for messages and the source text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shader {
    /// The name, as in `shaders/NAME.wgsl`.
    pub name: &'static str,
    /// The WGSL text.
    pub source: &'static str,
}

/// How a kernel uses a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    ReadWrite,
}

/// The buffer that a binding refers to, by its role in the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The operation's input of this number.
    Input(usize),
    /// The operation's output of this number.
    Output(usize),
    /// Scratch memory of this number, declared in [`Launches::scratch`], alive only within the operation.
    Scratch(usize),
}

/// One storage buffer bound to a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The number in `@binding(number)`; 0 is the uniform parameters.
    pub number: u32,
    /// Which buffer.
    pub slot: Slot,
    /// Read-only or read-write.
    pub access: Access,
}

/// A 32-bit word of a kernel's uniform parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub u32);

impl From<u32> for Word {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl From<usize> for Word {
    /// Sizes on a graph are checked to fit 31 bits when the graph is built, so nothing is cut off here.
    fn from(value: usize) -> Self {
        Self(value as u32)
    }
}

impl From<f32> for Word {
    fn from(value: f32) -> Self {
        Self(value.to_bits())
    }
}

/// One dispatch of one entry point.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The module.
    pub shader: Shader,
    /// The entry point.
    pub entry: &'static str,
    /// Values of the module's `override` constants.
    pub constants: Vec<(&'static str, f64)>,
    /// The storage buffers.
    pub bindings: Vec<Binding>,
    /// The uniform parameters at `@binding(0)`, in the order of the WGSL struct.
    pub params: Vec<Word>,
    /// How many workgroups, in x, y and z.
    pub workgroups: [u32; 3],
}

impl Launch {
    /// A launch of `entry` in `shader`, to be completed with the methods below.
    #[must_use]
    pub fn new(shader: Shader, entry: &'static str) -> Self {
        Self {
            shader,
            entry,
            constants: Vec::new(),
            bindings: Vec::new(),
            params: Vec::new(),
            workgroups: [1; 3],
        }
    }

    /// Sets an `override` constant.
    #[must_use]
    pub fn constant(mut self, name: &'static str, value: impl Into<f64>) -> Self {
        self.constants.push((name, value.into()));
        self
    }

    /// Binds a buffer for reading.
    #[must_use]
    pub fn read(mut self, number: u32, slot: Slot) -> Self {
        self.bindings.push(Binding {
            number,
            slot,
            access: Access::Read,
        });
        self
    }

    /// Binds a buffer for reading and writing.
    #[must_use]
    pub fn write(mut self, number: u32, slot: Slot) -> Self {
        self.bindings.push(Binding {
            number,
            slot,
            access: Access::ReadWrite,
        });
        self
    }

    /// Appends a uniform parameter.
    #[must_use]
    pub fn param(mut self, word: impl Into<Word>) -> Self {
        self.params.push(word.into());
        self
    }

    /// Sets the grid.
    #[must_use]
    pub fn grid(mut self, workgroups: [u32; 3]) -> Self {
        self.workgroups = workgroups;
        self
    }

    /// Folds a one-dimensional grid into x and y and appends the number of workgroups along x as the next parameter
    /// (`groups_per_row` in the shaders), because a dimension stops at 65,535 workgroups.
    ///
    /// # Errors
    /// [`Error::Limit`] if even the folded grid is too large for the device.
    pub fn folded(mut self, groups: usize, capabilities: &Capabilities) -> Result<Self> {
        let widest = capabilities.max_workgroups_per_dimension as usize;
        let rows = groups.div_ceil(widest);
        if rows > widest {
            return Err(Error::Limit {
                thing: format!("a launch of `{}::{}`", self.shader.name, self.entry),
                needed: groups as u64,
                limit: (widest * widest) as u64,
                unit: "workgroups",
            });
        }
        let per_row = groups.div_ceil(rows.max(1));
        self.workgroups = [per_row as u32, rows as u32, 1];
        Ok(self.param(per_row))
    }
}

/// The launches of one operation, in order, and the scratch memory they share.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Launches {
    /// The dispatches.
    pub launches: Vec<Launch>,
    /// The size in bytes of each scratch buffer.
    pub scratch: Vec<u64>,
}

impl Launches {
    /// Adds a scratch buffer of so many 32-bit words and returns its slot.
    pub fn scratch_words(&mut self, words: usize) -> Slot {
        self.scratch.push(words as u64 * 4);
        Slot::Scratch(self.scratch.len() - 1)
    }
}

impl From<Launch> for Launches {
    fn from(launch: Launch) -> Self {
        Self {
            launches: vec![launch],
            scratch: Vec::new(),
        }
    }
}

impl From<Vec<Launch>> for Launches {
    fn from(launches: Vec<Launch>) -> Self {
        Self {
            launches,
            scratch: Vec::new(),
        }
    }
}
