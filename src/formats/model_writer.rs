//! Writing a model in several safetensors files and their index.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::json;

use crate::error::{Error, Result};
use crate::file;
use crate::formats::checkpoint::{self, Checkpoint, INDEX, RawTensor};

/// A tensor to be written: copied as another model has it, or made of floats.
#[derive(Debug)]
pub struct OutputTensor<'a>(RawTensor<'a>);

impl<'a> OutputTensor<'a> {
    /// A tensor of another model under the name it has there, byte for byte, whatever the type of its elements.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there.
    pub fn copied(checkpoint: &'a Checkpoint, name: &str) -> Result<Self> {
        let bytes = checkpoint.raw(name)?;
        let entry = checkpoint.entry(name).ok_or_else(|| Error::UnknownName {
            kind: "tensor",
            name: name.to_owned(),
        })?;
        Ok(Self(RawTensor {
            name: name.to_owned(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            bytes: Cow::Borrowed(bytes),
        }))
    }

    /// A tensor whose elements are rounded to F32, F16 or BF16.
    ///
    /// # Errors
    /// [`Error::Setting`] for any other type; [`Error::NotFinite`] and [`Error::Limit`], with the tensor's name, if a number is not
    /// finite or beyond what the type holds.
    pub fn floats(
        name: String,
        shape: &[usize],
        elements: Cow<'a, [f32]>,
        dtype: Dtype,
    ) -> Result<Self> {
        let halves = |round: fn(f32) -> u16| {
            let bits: Vec<u16> = elements.iter().map(|&x| round(x)).collect();
            Cow::Owned(bytemuck::cast_slice(&bits).to_vec())
        };
        let (bytes, largest) = match (dtype, &elements) {
            (Dtype::F32, Cow::Borrowed(elements)) => {
                (Cow::Borrowed(bytemuck::cast_slice(elements)), f32::MAX)
            }
            (Dtype::F32, Cow::Owned(elements)) => (
                Cow::Owned(bytemuck::cast_slice(elements).to_vec()),
                f32::MAX,
            ),
            (Dtype::F16, _) => (halves(|x| f16::from_f32(x).to_bits()), 65_504.0),
            (Dtype::BF16, _) => (halves(|x| bf16::from_f32(x).to_bits()), bf16::MAX.to_f32()),
            _ => {
                return Err(Error::setting(
                    "dtype",
                    format!("{dtype:?}"),
                    "floats are written in F32, F16 and BF16",
                ));
            }
        };
        if let Some(element) = elements.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                value: format!("tensor `{name}`"),
                element,
            });
        }
        let over = elements.iter().find(|x| x.abs() > largest);
        if let Some(number) = over {
            return Err(Error::Limit {
                thing: format!("tensor `{name}` in {dtype:?}"),
                needed: number.abs() as u64,
                limit: largest as u64,
                unit: "as its largest number",
            });
        }
        Ok(Self(RawTensor {
            name,
            dtype,
            shape: shape.to_vec(),
            bytes,
        }))
    }

    /// The tensor's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The size of its data.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes.len()
    }
}

/// A model that is written file by file. Any number of threads may write files of one model, each its own.
#[derive(Clone, Debug)]
pub struct ModelWriter {
    folder: PathBuf,
}

impl ModelWriter {
    /// A model in a folder, which must be there.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// The name of file `number` (from 1) of so many.
    #[must_use]
    pub fn shard_name(number: usize, of: usize) -> String {
        format!("model-{number:05}-of-{of:05}.safetensors")
    }

    /// Writes one of the files, under a temporary name beside it first.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written, [`Error::Format`] if a tensor's shape does not fit its data.
    pub fn write_shard(
        &self,
        file: &str,
        tensors: Vec<OutputTensor<'_>>,
        metadata: BTreeMap<String, String>,
    ) -> Result<()> {
        let tensors: Vec<_> = tensors.into_iter().map(|tensor| tensor.0).collect();
        let metadata = metadata
            .into_iter()
            .chain([("format".to_owned(), "pt".to_owned())])
            .collect();
        checkpoint::write(&self.folder.join(file), &tensors, metadata)
    }

    /// Writes the index of these files, all of which are there: which tensor is in which, and the size of all data.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] for each, and [`Error::File`] if the index cannot be written.
    pub fn write_index(&self, files: &[String]) -> Result<()> {
        let mut map = BTreeMap::new();
        let mut total = 0_u64;
        for file in files {
            let shard = Checkpoint::open(self.folder.join(file))?;
            for (name, entry) in shard.tensors() {
                total += entry.bytes() as u64;
                if let Some(other) = map.insert(name.to_owned(), file) {
                    return Err(Error::Format {
                        path: self.folder.join(file),
                        reason: format!("tensor `{name}` is in {other} too"),
                    });
                }
            }
        }
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json(&self.folder.join(INDEX), &index)
    }
}

/// Writes JSON for people to read.
pub(crate) fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let mut text = format!("{value:#}");
    text.push('\n');
    file::replace(path, text.as_bytes())
}
