//! safetensors files: named tensors and string metadata.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Cursor;
use std::path::Path;

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::error::{Error, Result};
use crate::file;
use crate::formats::checkpoint::{explain, order_metadata};
use crate::graph::{MASTER, ParameterStore, Storage, rounds_to};
use crate::tensor::{Tensor, TensorData};

/// A whole file's contents.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}

/// Named tensors and metadata, as in one safetensors file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// The tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The metadata: strings by name.
    pub metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Reads a file. Elements of type F16 and BF16 become 32-bit floats.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::Format`] if it is damaged or holds elements of another type.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bytes(path)?;
        Self::parse(&bytes, path)
    }

    /// Reads the contents of a file; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] if they are damaged or hold elements of an unknown type.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.to_owned(),
            reason,
        };
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|error| wrong(explain(bytes, &error)))?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| wrong(error.to_string()))?;
        let metadata = header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let data = elements(&view).ok_or_else(|| {
                wrong(format!(
                    "tensor `{name}` has elements of type {:?}; F64, F32, F16, BF16, I32, and I64 whose numbers fit 32 bits are read",
                    view.dtype()
                ))
            })?;
            let tensor = Tensor::new(view.shape().into(), data)
                .map_err(|error| wrong(format!("tensor `{name}`: {error}")))?;
            tensors.insert(name, tensor);
        }
        Ok(Self { tensors, metadata })
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::UnknownName {
            kind: "tensor",
            name: name.to_owned(),
        })
    }

    /// Writes the file under a temporary name beside it and renames it, so that the old file is there until the new one is whole.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let views = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name, view(tensor, path)?)))
            .collect::<Result<Vec<_>>>()?;
        let metadata: HashMap<String, String> = self.metadata.clone().into_iter().collect();
        let mut bytes = Cursor::new(
            safetensors::serialize(views, (!metadata.is_empty()).then_some(metadata)).map_err(
                |error| Error::Format {
                    path: path.to_owned(),
                    reason: error.to_string(),
                },
            )?,
        );
        order_metadata(&mut bytes).map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })?;
        file::replace(path, bytes.get_ref())
    }
}

pub(crate) fn elements(view: &TensorView<'_>) -> Option<TensorData> {
    let bytes = view.data();
    Some(match view.dtype() {
        Dtype::F32 => TensorData::F32(bytemuck::pod_collect_to_vec(bytes)),
        Dtype::F64 => TensorData::F64(bytemuck::pod_collect_to_vec(bytes)),
        Dtype::I32 => TensorData::I32(bytemuck::pod_collect_to_vec(bytes)),
        Dtype::F16 => {
            let halves: Vec<u16> = bytemuck::pod_collect_to_vec(bytes);
            TensorData::F32(
                halves
                    .into_iter()
                    .map(|bits| f16::from_bits(bits).to_f32())
                    .collect(),
            )
        }
        Dtype::BF16 => {
            let halves: Vec<u16> = bytemuck::pod_collect_to_vec(bytes);
            TensorData::F32(
                halves
                    .into_iter()
                    .map(|bits| bf16::from_bits(bits).to_f32())
                    .collect(),
            )
        }
        Dtype::I64 => {
            let wide: Vec<i64> = bytemuck::pod_collect_to_vec(bytes);
            TensorData::I32(
                wide.into_iter()
                    .map(|x| i32::try_from(x).ok())
                    .collect::<Option<_>>()?,
            )
        }
        _ => return None,
    })
}

fn view<'a>(tensor: &'a Tensor, path: &Path) -> Result<TensorView<'a>> {
    let (dtype, bytes): (_, &[u8]) = match tensor.data() {
        TensorData::F32(data) => (Dtype::F32, bytemuck::cast_slice(data)),
        TensorData::F64(data) => (Dtype::F64, bytemuck::cast_slice(data)),
        TensorData::I32(data) => (Dtype::I32, bytemuck::cast_slice(data)),
    };
    TensorView::new(dtype, tensor.shape().dims().to_vec(), bytes).map_err(|error| Error::Format {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

impl ParameterStore {
    /// Writes the parameters whose name `keep` accepts to a safetensors file, under a temporary name that is then renamed.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written, [`Error::DeviceLost`] if the device is gone.
    pub fn save(
        &self,
        path: impl AsRef<Path>,
        metadata: BTreeMap<String, String>,
        keep: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut file = TensorFile {
            tensors: BTreeMap::new(),
            metadata,
        };
        for name in self.names().into_iter().filter(|name| keep(name)) {
            let tensor = self.read(&name)?;
            file.tensors.insert(name, tensor);
        }
        file.write(path)
    }

    /// Puts every tensor of a safetensors file into the store and returns the file's metadata. Nothing is put in if one of them
    /// has another shape than the store has under its name.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Format`] if it cannot be read, [`Error::TypeMismatch`] if a shape is another,
    /// [`Error::OutOfMemory`] if the device is full.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<BTreeMap<String, String>> {
        let file = TensorFile::read(path)?;
        for (name, tensor) in &file.tensors {
            if let Some(expected) = self.ty(name)
                && expected.shape != *tensor.shape()
            {
                return Err(Error::TypeMismatch {
                    name: name.clone(),
                    expected,
                    found: tensor.ty(),
                });
            }
        }
        for (name, tensor) in &file.tensors {
            // A master copy has digits that its parameter in 16 bits has lost; one that is of other weights is left behind.
            let master = file.tensors.get(&format!("{MASTER}{name}"));
            let parameter = name.strip_prefix(MASTER);
            if let Some(parameter) = parameter.and_then(|name| file.tensors.get(name)) {
                let tensor = if rounds_to(tensor, parameter) {
                    tensor
                } else {
                    parameter
                };
                self.put(name, tensor, Storage::F32)?;
            } else if master.is_some() {
                self.put(name, tensor, Storage::F32)?;
            } else {
                self.insert(name, tensor)?;
            }
        }
        Ok(file.metadata)
    }
}
