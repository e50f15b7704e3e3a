//! GGUF files, version 3: metadata and tensors, plain or in blocks of quantised elements, and LoRA adapters.

mod blocks;
mod read;
mod write;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::file_bytes::FileBytes;
use crate::tensor::Tensor;

pub use write::GgufWriter;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// What the data of every tensor is aligned to, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The most dimensions that a tensor has.
const MOST_DIMENSIONS: usize = 4;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GgufType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit floats with 8 bits of exponent.
    Bf16,
    /// Blocks of 32: a 16-bit scale d, 4 bits an element: d (q - 8).
    Q4_0,
    /// Blocks of 32: 16-bit d and m, 4 bits an element: d q + m.
    Q4_1,
    /// Blocks of 32: a 16-bit scale d, 8 bits an element: d q.
    Q8_0,
    /// A type of this number, whose elements this crate does not read.
    Other(u32),
}

impl GgufType {
    fn of_number(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
            Self::Other(number) => number,
        }
    }

    /// Elements of a block, and its bytes; `None` for types that are not read.
    fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::Bf16 => Some((1, 2)),
            Self::Q4_0 => Some((32, 18)),
            Self::Q4_1 => Some((32, 20)),
            Self::Q8_0 => Some((32, 34)),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for GgufType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bf16 => write!(f, "BF16"),
            Self::Other(number) => write!(f, "type {number}"),
            known => write!(f, "{known:?}"),
        }
    }
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// An unsigned integer of 8 bits.
    U8(u8),
    /// An integer of 8 bits.
    I8(i8),
    /// An unsigned integer of 16 bits.
    U16(u16),
    /// An integer of 16 bits.
    I16(i16),
    /// An unsigned integer of 32 bits.
    U32(u32),
    /// An integer of 32 bits.
    I32(i32),
    /// A float of 32 bits.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Values of one kind: of the kind of this number where there are none.
    Array(u32, Vec<Self>),
    /// An unsigned integer of 64 bits.
    U64(u64),
    /// An integer of 64 bits.
    I64(i64),
    /// A float of 64 bits.
    F64(f64),
}

impl GgufValue {
    /// The number of the kind in files.
    fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Array(..) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// An array of texts.
    #[must_use]
    pub fn texts(texts: impl IntoIterator<Item = String>) -> Self {
        Self::Array(8, texts.into_iter().map(Self::Text).collect())
    }

    /// The text, if it is one.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The values of an array, if it is one.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(_, values) => Some(values),
            _ => None,
        }
    }

    /// The number as an unsigned integer, if it is a whole number that is not negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The number, if it is a float.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// The extents, row-major: the last is that of neighbours in memory. Files list them the other way round.
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub ty: GgufType,
    /// Where the data begins, in bytes from the beginning of the file.
    pub offset: u64,
    bytes: usize,
}

impl GgufTensor {
    /// The size of the data; 0 for a type that is not read.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// An open GGUF file: all metadata, and the tensors to be read one at a time.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    bytes: FileBytes,
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<(String, GgufTensor)>,
    /// The places of the tensors in the list, by their names.
    places: HashMap<String, usize>,
}

/// The two matrices of one adapted weight, as a GGUF adapter holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufLora {
    /// The name of the weight that is adapted.
    pub weight: String,
    /// `[rank, d_in]`.
    pub a: Tensor,
    /// `[d_out, rank]`.
    pub b: Tensor,
}

impl GgufFile {
    /// Opens a file: reads the metadata and where the tensors are, and maps the rest.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::Format`] with the offset if it is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        read::parse(FileBytes::map(path)?, path)
    }

    /// The same with the contents in memory; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] with the offset if they are damaged.
    pub fn parse(bytes: Vec<u8>, path: impl AsRef<Path>) -> Result<Self> {
        read::parse(bytes.into(), path.as_ref())
    }

    /// The metadata, in the order of the file.
    #[must_use]
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// A value of the metadata.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        let mut found = self.metadata.iter().filter(|(name, _)| name == key);
        found.next().map(|(_, value)| value)
    }

    /// The tensors, in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[(String, GgufTensor)] {
        &self.tensors
    }

    fn find(&self, name: &str) -> Result<&GgufTensor> {
        let place = self.places.get(name).ok_or_else(|| Error::UnknownName {
            kind: "tensor",
            name: name.to_owned(),
        })?;
        Ok(&self.tensors[*place].1)
    }

    /// A tensor's bytes as they are in the file.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there, [`Error::Format`] if it is of a type that is not read.
    pub fn raw(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.find(name)?;
        if tensor.ty.block().is_none() {
            return Err(Error::Format {
                path: self.path.clone(),
                reason: format!(
                    "tensor `{name}` is of {}; F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are read",
                    tensor.ty
                ),
            });
        }
        // Checked when the file was opened.
        let start = tensor.offset as usize;
        Ok(&self.bytes[start..start + tensor.bytes])
    }

    /// A tensor's elements as 32-bit floats.
    ///
    /// # Errors
    /// As [`GgufFile::raw`], and [`Error::Limit`] if it has more elements than a tensor may.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let bytes = self.raw(name)?;
        let tensor = self.find(name)?;
        Tensor::f32(tensor.shape.as_slice(), blocks::to_floats(tensor.ty, bytes))
    }

    /// The factor `alpha` of an adapter file and its pairs of matrices, in the order of the file.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no adapter, or a matrix has no partner or another rank.
    pub fn lora(&self) -> Result<(f32, Vec<GgufLora>)> {
        read::lora(self)
    }
}
