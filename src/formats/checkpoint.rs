//! Models in safetensors, in one file or in several with an index, read one tensor at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::file;
use crate::formats::file_bytes::FileBytes;
use crate::formats::safetensors::elements;
use crate::tensor::{DType, Tensor};

/// The file of a model that is in one.
const WHOLE: &str = "model.safetensors";
/// The file that says in which of several files each tensor is.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The file of an adapter.
pub(crate) const ADAPTER: &str = "adapter_model.safetensors";

/// The longest header that the safetensors format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// An open model: where each tensor is. The files are mapped, so that only what is asked for is read.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(PathBuf, FileBytes)>,
    tensors: BTreeMap<String, TensorEntry>,
    metadata: BTreeMap<String, String>,
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The extents, row-major.
    pub shape: Vec<usize>,
    /// The number of the file in [`Checkpoint::files`].
    pub file: usize,
    start: usize,
    end: usize,
}

impl TensorEntry {
    /// The size of the data.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.end - self.start
    }
}

/// A model's index.
#[derive(Debug, Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    fn empty() -> Self {
        Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// Opens a safetensors file, an index, or a folder that holds `model.safetensors`, `model.safetensors.index.json` with its files, or
    /// `adapter_model.safetensors`.
    ///
    /// # Errors
    /// [`Error::File`] if something is not there or cannot be read; [`Error::Format`], with the tensor's name and its offset, if a
    /// file is damaged or lacks what the index says it holds.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let mut known = [WHOLE, INDEX, ADAPTER]
                .map(|name| path.join(name))
                .into_iter();
            let Some(found) = known.find(|path| path.exists()) else {
                return Err(Error::Format {
                    path: path.to_owned(),
                    reason: format!("holds none of {WHOLE}, {INDEX}, {ADAPTER}"),
                });
            };
            return Self::open(found);
        }
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            Self::open_index(path)
        } else {
            let mut checkpoint = Self::empty();
            checkpoint.add(path)?;
            Ok(checkpoint)
        }
    }

    fn open_index(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.to_owned(),
            reason,
        };
        let index: Index = file::read_json(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut checkpoint = Self::empty();
        let mut number_of = BTreeMap::new();
        for (tensor, file) in &index.weight_map {
            // A name with a folder in it could be any file of the machine.
            if Path::new(file)
                .file_name()
                .is_none_or(|name| name != file.as_str())
            {
                return Err(wrong(format!(
                    "tensor `{tensor}` is said to be in `{file}`, which is no plain file name"
                )));
            }
            if !number_of.contains_key(file) {
                number_of.insert(file, checkpoint.files.len());
                checkpoint.add(&folder.join(file))?;
            }
        }
        for (tensor, file) in &index.weight_map {
            let found = checkpoint.tensors.get(tensor).map(|entry| entry.file);
            if found != number_of.get(file).copied() {
                return Err(wrong(format!(
                    "tensor `{tensor}` is said to be in `{file}`, which does not hold it"
                )));
            }
        }
        Ok(checkpoint)
    }

    /// Adds the tensors of one file.
    fn add(&mut self, path: &Path) -> Result<()> {
        let bytes = FileBytes::map(path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| Error::Format {
                path: path.to_owned(),
                reason: explain(&bytes, &error),
            })?;
        let data = 8 + header;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let entry = TensorEntry {
                dtype: info.dtype,
                shape: info.shape.clone(),
                file,
                start: data + start,
                end: data + end,
            };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                return Err(Error::Format {
                    path: path.to_owned(),
                    reason: format!(
                        "tensor `{name}` is in {} too",
                        self.files[other.file].0.display()
                    ),
                });
            }
        }
        self.metadata
            .extend(metadata.metadata().clone().unwrap_or_default());
        self.files.push((path.to_owned(), bytes));
        Ok(())
    }

    /// The tensors, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.tensors
            .iter()
            .map(|(name, entry)| (name.as_str(), entry))
    }

    /// The names that begin like this.
    pub(crate) fn names_from<'a>(&'a self, beginning: &'a str) -> impl Iterator<Item = &'a str> {
        let behind = self.tensors.range::<str, _>((
            std::ops::Bound::Included(beginning),
            std::ops::Bound::Unbounded,
        ));
        behind
            .map(|(name, _)| name.as_str())
            .take_while(move |name| name.starts_with(beginning))
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// The metadata of all files.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What is known of a tensor, if it is there.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    fn find(&self, name: &str) -> Result<&TensorEntry> {
        self.entry(name).ok_or_else(|| Error::UnknownName {
            kind: "tensor",
            name: name.to_owned(),
        })
    }

    /// A tensor's bytes as they are in the file.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there.
    pub fn raw(&self, name: &str) -> Result<&[u8]> {
        let entry = self.find(name)?;
        // Checked when the file was opened.
        Ok(&self.files[entry.file].1[entry.start..entry.end])
    }

    /// A tensor. Elements of type F16 and BF16 become 32-bit floats.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there, [`Error::Format`], with its place, if its elements are of a type that is not read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.find(name)?;
        let wrong = |reason: String| self.wrong(name, &reason);
        let view = TensorView::new(entry.dtype, entry.shape.clone(), self.raw(name)?)
            .map_err(|error| wrong(error.to_string()))?;
        let data = elements(&view).ok_or_else(|| {
            wrong(format!(
                "elements of type {:?}; F64, F32, F16, BF16, I32, and I64 whose numbers fit 32 bits are read",
                entry.dtype
            ))
        })?;
        Tensor::new(entry.shape.as_slice().into(), data).map_err(|error| wrong(error.to_string()))
    }

    /// A tensor whose elements are all finite.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::Format`] if an element is not finite.
    pub(crate) fn finite_tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = match self.tensor(name)? {
            // What 64 bits hold may be infinite in 32.
            tensor if tensor.dtype() == DType::F64 => Tensor::f32(tensor.shape(), tensor.to_f32())?,
            tensor => tensor,
        };
        match tensor.first_not_finite() {
            None => Ok(tensor),
            Some(element) => Err(self.wrong(
                name,
                &format!("holds a NaN or an infinity (element {element})"),
            )),
        }
    }

    /// The extents of a tensor that must be a matrix.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not there or none.
    pub(crate) fn matrix(&self, name: &str) -> Result<[usize; 2]> {
        let Some(entry) = self.entry(name) else {
            return Err(self.wrong(name, "it is missing"));
        };
        <[usize; 2]>::try_from(entry.shape.as_slice())
            .map_err(|_| self.wrong(name, &format!("{:?} is no matrix", entry.shape)))
    }

    /// What is wrong with a tensor: an error that names it, its file and its place there.
    pub(crate) fn wrong(&self, name: &str, reason: &str) -> Error {
        match self.tensors.get(name) {
            Some(entry) => Error::Format {
                path: self.files[entry.file].0.clone(),
                reason: format!("tensor `{name}` at byte {}: {reason}", entry.start),
            },
            None => Error::Format {
                path: self.path(),
                reason: format!("tensor `{name}`: {reason}"),
            },
        }
    }

    /// What is wrong with the file, or with the first of several.
    pub(crate) fn fault(&self, reason: String) -> Error {
        Error::Format {
            path: self.path(),
            reason,
        }
    }

    fn path(&self) -> PathBuf {
        let first = self.files.first();
        first.map(|(path, _)| path.clone()).unwrap_or_default()
    }
}

/// A tensor to be written: its name, the type of its elements, its extents and its bytes.
#[derive(Debug)]
pub(crate) struct RawTensor<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: std::borrow::Cow<'a, [u8]>,
}

/// Writes a safetensors file under a temporary name beside it and renames it.
pub(crate) fn write(
    path: &Path,
    tensors: &[RawTensor<'_>],
    metadata: HashMap<String, String>,
) -> Result<()> {
    let wrong = |error: &SafeTensorError| Error::Format {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let mut names = HashSet::new();
    let views = tensors
        .iter()
        .map(|tensor| {
            if !names.insert(tensor.name.as_str()) {
                return Err(Error::DuplicateName {
                    name: tensor.name.clone(),
                    reason: format!("another tensor for {}", path.display()),
                });
            }
            let bits = tensor
                .shape
                .iter()
                .try_fold(tensor.dtype.bitsize(), |bits, &extent| {
                    bits.checked_mul(extent)
                });
            if bits.is_none() {
                return Err(Error::shape(
                    "safetensors",
                    format!(
                        "tensor `{}` of {:?} has more elements than can be counted",
                        tensor.name, tensor.shape
                    ),
                ));
            }
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            Ok((tensor.name.as_str(), view.map_err(|error| wrong(&error))?))
        })
        .collect::<Result<Vec<_>>>()?;
    file::replace_at(path, |temporary| {
        let entries = metadata.len();
        let metadata = (entries > 0).then_some(metadata);
        // The safetensors crate makes a file of its own that its user alone may read: what a new file is given here is what this one gets.
        let permissions = fs::metadata(temporary)?.permissions();
        match safetensors::serialize_to_file(views, metadata, temporary) {
            Err(SafeTensorError::IoError(source)) => return Err(source),
            other => other.map_err(io::Error::other)?,
        }
        fs::set_permissions(temporary, permissions)?;
        if entries > 1 {
            let mut file = OpenOptions::new().read(true).write(true).open(temporary)?;
            order_metadata(&mut file)?;
        }
        Ok(())
    })
}

/// Puts the metadata of a safetensors file in the order of its keys: the safetensors crate writes it in an order that differs from run to run.
pub(crate) fn order_metadata(file: &mut (impl Read + Write + Seek)) -> io::Result<()> {
    let mut length = [0; 8];
    file.rewind()?;
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    Read::by_ref(file)
        .take(u64::from_le_bytes(length))
        .read_to_end(&mut header)?;
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&header)?;
    if let Some(serde_json::Value::Object(metadata)) = object.get_mut("__metadata__") {
        metadata.sort_keys();
    }
    let mut ordered = serde_json::to_vec(&object)?;
    if ordered.len() > header.len() {
        return Err(io::Error::other("the ordered header is longer"));
    }
    // As it was, filled up with spaces.
    ordered.resize(header.len(), b' ');
    file.seek(SeekFrom::Start(8))?;
    file.write_all(&ordered)
}

/// What is wrong with a safetensors file, with the tensor's name and the offset in the file.
pub(crate) fn explain(bytes: &[u8], error: &SafeTensorError) -> String {
    let found = header_of(bytes).and_then(|(start, header)| fault_of(header, start, bytes.len()));
    match found {
        Ok(()) => error.to_string(),
        Err(reason) => reason,
    }
}

/// What the header says of a tensor.
#[derive(Deserialize)]
struct HeaderEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The tensors of a header, in the order in which they stand there.
#[derive(Default)]
struct Header(Vec<(String, HeaderEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry = map.next_value().map_err(|error| {
                            A::Error::custom(format!("tensor `{name}`: {error}"))
                        })?;
                        header.0.push((name, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

/// The header of a file and where its data begins, or why there is none.
fn header_of(bytes: &[u8]) -> Result<(usize, Header), String> {
    let length = bytes.len();
    let Some(first) = bytes.first_chunk() else {
        return Err(format!(
            "byte 0: the header's length takes 8 bytes, the file has {length}"
        ));
    };
    let header = u64::from_le_bytes(*first);
    let end = usize::try_from(header).ok().and_then(|n| n.checked_add(8));
    let Some(end) = end.filter(|end| *end <= length) else {
        return Err(format!(
            "byte 0: the header is said to take {header} bytes, the file has {length}"
        ));
    };
    if header > LONGEST_HEADER {
        return Err(format!(
            "byte 0: the header takes {header} bytes, the limit is {LONGEST_HEADER}"
        ));
    }
    let header = serde_json::from_slice(&bytes[8..end])
        .map_err(|error| format!("byte 8: the header is no JSON of tensors: {error}"))?;
    Ok((end, header))
}

/// The first tensor, in the order of the data, that does not fit its file.
fn fault_of(Header(mut entries): Header, start: usize, length: usize) -> Result<(), String> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut end = 0;
    for (name, entry) in &entries {
        let (from, to) = entry.data_offsets;
        let place = format!("tensor `{name}` at offset {from} after byte {start}");
        let bits = entry
            .shape
            .iter()
            .try_fold(entry.dtype.bitsize(), |product, &n| product.checked_mul(n));
        let Some(bits) = bits else {
            return Err(format!(
                "{place}: the shape {:?} has more elements than can be counted",
                entry.shape
            ));
        };
        if to < from {
            return Err(format!("{place} ends at {to}, before it begins"));
        }
        if bits != (to - from).saturating_mul(8) {
            return Err(format!(
                "{place}: the shape {:?} of {:?} takes {} bytes, the offsets leave {}",
                entry.shape,
                entry.dtype,
                bits / 8,
                to - from
            ));
        }
        if from != end {
            return Err(format!("{place}: the tensor before it ends at {end}"));
        }
        end = to;
        if to > length - start {
            return Err(format!(
                "{place} ends at byte {}, the file at byte {length}",
                start.saturating_add(to)
            ));
        }
    }
    if start + end != length {
        return Err(format!(
            "byte {}: behind the last tensor are {} bytes of no tensor",
            start + end,
            length - start - end
        ));
    }
    Ok(())
}
