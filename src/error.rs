//! The crate's one error type. Every variant names the thing, its size and the limit it met.

use std::path::PathBuf;

use crate::tensor::TensorType;

/// What the library returns instead of panicking.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shapes or element types given to an operation do not fit together. Raised while the graph is built.
    #[error("{op}: {reason}")]
    Shape {
        /// The operation's name.
        op: &'static str,
        /// What was given and what would fit.
        reason: String,
    },

    /// A setting of a layer, an optimiser or a program is outside what it can be.
    #[error("{setting} = {value}: {reason}")]
    Setting {
        /// The setting's name.
        setting: &'static str,
        /// The value it was given.
        value: String,
        /// Why it cannot be that.
        reason: String,
    },

    /// A [`Value`](crate::Value) of one graph was used in another.
    #[error("{op}: an operand belongs to another graph")]
    ForeignValue {
        /// The operation it was given to.
        op: &'static str,
    },

    /// A name was given to two inputs, or to two parameters of different shapes.
    #[error("the name `{name}` is already taken: {reason}")]
    DuplicateName {
        /// The name.
        name: String,
        /// By what it is taken.
        reason: String,
    },

    /// An operation on the path from the loss to a wanted value has no gradient rule.
    #[error("`{op}` has no gradient rule")]
    NoGradient {
        /// The operation's name.
        op: &'static str,
    },

    /// A gradient was asked for with respect to a value that the loss does not depend on.
    #[error("the loss does not depend on {value}")]
    NoPath {
        /// The value, by name.
        value: String,
    },

    /// A session was asked for a value that it does not keep.
    #[error(
        "{value} is not an output of this session: mark it with `Graph::output` before compiling"
    )]
    NotKept {
        /// The value, by name.
        value: String,
    },

    /// An input or a parameter of that name does not exist.
    #[error("there is no {kind} named `{name}`")]
    UnknownName {
        /// `input` or `parameter`.
        kind: &'static str,
        /// The name asked for.
        name: String,
    },

    /// A tensor's shape or element type is not the one declared.
    #[error("`{name}` is declared as {expected}, but was given {found}")]
    TypeMismatch {
        /// The input's or parameter's name.
        name: String,
        /// What the graph or the store declares.
        expected: TensorType,
        /// What was given.
        found: TensorType,
    },

    /// A session was run before one of its inputs was written.
    #[error("the input `{name}` was never written")]
    MissingInput {
        /// The input's name.
        name: String,
    },

    /// An index (a label, a token id) is outside the table it points into.
    #[error("`{name}`: element {position} is {index}, allowed are 0..{limit}{}", .ignored.map(|i| format!(" and {i} (ignored)")).unwrap_or_default())]
    IndexOutOfRange {
        /// The input's name.
        name: String,
        /// Which element.
        position: usize,
        /// The index found there.
        index: i32,
        /// One past the largest index allowed.
        limit: usize,
        /// An index that means "skip this one", where the operation has one.
        ignored: Option<i32>,
    },

    /// Checked mode, or a conversion, met a NaN or an infinity.
    #[error("{value} holds a NaN or an infinity (element {element})")]
    NotFinite {
        /// The value, by operation or name.
        value: String,
        /// The first element that is not finite.
        element: usize,
    },

    /// `RANKMIX_DEVICE` (or the option of that meaning) names nothing on this machine.
    #[error("no device matches `{requested}`; there is: {}", .available.join(", "))]
    UnknownDevice {
        /// What was asked for.
        requested: String,
        /// What could have been asked for.
        available: Vec<String>,
    },

    /// No adapter could be found or opened.
    #[error("no GPU adapter for {requested}: {reason}")]
    NoAdapter {
        /// The backend or adapter asked for.
        requested: String,
        /// What the driver or wgpu said.
        reason: String,
    },

    /// Something is larger than the adapter, or a number format, allows.
    #[error("{thing} needs {needed} {unit}, the limit is {limit}")]
    Limit {
        /// What is too large.
        thing: String,
        /// How much it needs.
        needed: u64,
        /// How much there is.
        limit: u64,
        /// The unit of both.
        unit: &'static str,
    },

    /// The device has no memory left for an allocation.
    #[error("the device is out of memory: {thing} needs {bytes} bytes")]
    OutOfMemory {
        /// What was being allocated.
        thing: String,
        /// Its size in bytes.
        bytes: u64,
    },

    /// The device was lost (unplugged, reset, driver crash). What is on the host is intact; open a new device.
    #[error("the device was lost: {reason}")]
    DeviceLost {
        /// What the driver said.
        reason: String,
    },

    /// The driver or wgpu refused something: a shader, a pipeline, a submission.
    #[error("{thing}: {reason}")]
    Gpu {
        /// What was being done.
        thing: String,
        /// What wgpu said.
        reason: String,
    },

    /// A call that waits for the device was made in a browser, where nothing may wait. It did nothing.
    #[error("{call} waits for the device, which a browser does not allow: await {instead}")]
    WouldBlock {
        /// The call that was made.
        call: &'static str,
        /// The one to await in its place.
        instead: &'static str,
    },

    /// A file could not be read or written.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },

    /// A file's contents are not what they should be.
    #[error("{}: {reason}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
}

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn shape(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Shape {
            op,
            reason: reason.into(),
        }
    }

    pub(crate) fn setting(
        setting: &'static str,
        value: impl ToString,
        reason: impl Into<String>,
    ) -> Self {
        Self::Setting {
            setting,
            value: value.to_string(),
            reason: reason.into(),
        }
    }
}
