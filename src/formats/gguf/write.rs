//! Writing GGUF files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::file;
use crate::formats::gguf::{
    ALIGNMENT, ALIGNMENT_KEY, GgufFile, GgufLora, GgufType, GgufValue, MAGIC, MOST_DIMENSIONS,
    VERSION,
};
use crate::tensor::Tensor;

/// A file to be written: metadata and tensors in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<(String, Vec<usize>, GgufType, Elements<'a>)>,
}

#[derive(Clone, Debug)]
enum Elements<'a> {
    Floats(&'a Tensor),
    /// As they are in another file.
    Raw(&'a [u8]),
}

impl<'a> GgufWriter<'a> {
    /// A file without metadata and tensors.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A LoRA adapter for a model of this architecture (`llama`, ...), its matrices in F32 or F16.
    ///
    /// # Errors
    /// As [`GgufWriter::tensor`].
    pub fn lora(
        architecture: &str,
        alpha: f32,
        pairs: &'a [GgufLora],
        ty: GgufType,
    ) -> Result<Self> {
        let text = |text: &str| GgufValue::Text(text.to_owned());
        let mut writer = Self::new();
        writer.value("general.type", text("adapter"))?;
        writer.value("general.architecture", text(architecture))?;
        writer.value("adapter.type", text("lora"))?;
        writer.value("adapter.lora.alpha", GgufValue::F32(alpha))?;
        for pair in pairs {
            writer.tensor(&format!("{}.lora_a", pair.weight), &pair.a, ty)?;
            writer.tensor(&format!("{}.lora_b", pair.weight), &pair.b, ty)?;
        }
        Ok(writer)
    }

    /// Everything that a file holds, its elements as they are.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is of a type that is not read.
    pub fn copy(file: &'a GgufFile) -> Result<Self> {
        let mut writer = Self {
            metadata: file.metadata().to_vec(),
            tensors: Vec::new(),
        };
        for (name, tensor) in file.tensors() {
            let elements = Elements::Raw(file.raw(name)?);
            let entry = (name.clone(), tensor.shape.clone(), tensor.ty, elements);
            writer.tensors.push(entry);
        }
        Ok(writer)
    }

    /// Adds a value to the metadata.
    ///
    /// # Errors
    /// [`Error::DuplicateName`] if the key is there already, [`Error::Setting`] for an array of values of several kinds, or an alignment that
    /// is no power of two up to 1,048,576.
    pub fn value(&mut self, key: &str, value: GgufValue) -> Result<()> {
        if self.metadata.iter().any(|(other, _)| other == key) {
            return Err(Error::DuplicateName {
                name: key.to_owned(),
                reason: "the metadata has it already".to_owned(),
            });
        }
        if !is_of_one_kind(&value) {
            return Err(Error::Setting {
                setting: "metadata",
                value: key.to_owned(),
                reason: "the values of an array must be of one kind".to_owned(),
            });
        }
        if key == ALIGNMENT_KEY
            && !value
                .as_u64()
                .is_some_and(|n| n.is_power_of_two() && n <= 1 << 20)
        {
            return Err(Error::setting(
                ALIGNMENT_KEY,
                format!("{value:?}"),
                "expected a power of two up to 1048576",
            ));
        }
        self.metadata.push((key.to_owned(), value));
        Ok(())
    }

    /// Adds a tensor of floats, to be stored as F32, F16 or BF16.
    ///
    /// # Errors
    /// [`Error::DuplicateName`] if the name is taken, [`Error::Setting`] for another type or more than 4 dimensions,
    /// [`Error::TypeMismatch`] if the elements are no floats.
    pub fn tensor(&mut self, name: &str, tensor: &'a Tensor, ty: GgufType) -> Result<()> {
        if self.tensors.iter().any(|(other, ..)| other == name) {
            return Err(Error::DuplicateName {
                name: name.to_owned(),
                reason: "the file has such a tensor already".to_owned(),
            });
        }
        if !matches!(ty, GgufType::F32 | GgufType::F16 | GgufType::Bf16) {
            return Err(Error::setting("type", ty, "F32, F16 and BF16 are written"));
        }
        if tensor.shape().rank() > MOST_DIMENSIONS {
            return Err(Error::setting(
                "dimensions",
                tensor.shape().rank(),
                format!("a tensor of a GGUF file has at most {MOST_DIMENSIONS}"),
            ));
        }
        if tensor.as_i32().is_some() {
            let mut expected = tensor.ty();
            expected.dtype = crate::DType::F32;
            return Err(Error::TypeMismatch {
                name: name.to_owned(),
                expected,
                found: tensor.ty(),
            });
        }
        let shape = tensor.shape().dims().to_vec();
        self.tensors
            .push((name.to_owned(), shape, ty, Elements::Floats(tensor)));
        Ok(())
    }

    fn alignment(&self) -> u64 {
        let mut found = self.metadata.iter().filter(|(key, _)| key == ALIGNMENT_KEY);
        found
            .next()
            .and_then(|(_, value)| value.as_u64())
            .unwrap_or(ALIGNMENT)
    }

    fn bytes_of(shape: &[usize], ty: GgufType, elements: &Elements<'_>) -> u64 {
        match (elements, ty.block()) {
            (Elements::Raw(bytes), _) => bytes.len() as u64,
            (Elements::Floats(_), Some((_, bytes))) => {
                shape.iter().product::<usize>() as u64 * bytes as u64
            }
            (Elements::Floats(_), None) => 0,
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut bytes, key);
            bytes.extend(value.kind().to_le_bytes());
            put_value(&mut bytes, value);
        }
        let mut offset = 0_u64;
        for (name, shape, ty, elements) in &self.tensors {
            put_text(&mut bytes, name);
            bytes.extend((shape.len() as u32).to_le_bytes());
            for &extent in shape.iter().rev() {
                bytes.extend((extent as u64).to_le_bytes());
            }
            bytes.extend(ty.number().to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            let end = offset + Self::bytes_of(shape, *ty, elements);
            offset = end.next_multiple_of(self.alignment());
        }
        bytes
    }

    /// Writes the file under a temporary name beside it and renames it, so that the old file is there until the new one is whole.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        file::replace_by(path.as_ref(), |file| self.write_to(file))
    }

    fn write_to(&self, file: &mut File) -> std::io::Result<()> {
        let alignment = self.alignment();
        let mut out = BufWriter::new(file);
        let header = self.header();
        out.write_all(&header)?;
        let mut pad = padding(header.len() as u64, alignment);
        for (_, shape, ty, elements) in &self.tensors {
            out.write_all(&pad)?;
            match elements {
                Elements::Raw(bytes) => out.write_all(bytes)?,
                Elements::Floats(tensor) => write_floats(&mut out, &tensor.to_f32(), *ty)?,
            }
            pad = padding(Self::bytes_of(shape, *ty, elements), alignment);
        }
        // Readers expect the last tensor to be padded too.
        out.write_all(&pad)?;
        out.flush()
    }
}

fn is_of_one_kind(value: &GgufValue) -> bool {
    let values = value.as_array().unwrap_or_default();
    values
        .iter()
        .all(|one| one.kind() == values[0].kind() && is_of_one_kind(one))
}

fn padding(length: u64, alignment: u64) -> Vec<u8> {
    vec![0; (length.next_multiple_of(alignment) - length) as usize]
}

fn write_floats(out: &mut impl Write, floats: &[f32], ty: GgufType) -> std::io::Result<()> {
    for &float in floats {
        match ty {
            GgufType::F16 => out.write_all(&f16::from_f32(float).to_le_bytes())?,
            GgufType::Bf16 => out.write_all(&bf16::from_f32(float).to_le_bytes())?,
            _ => out.write_all(&float.to_le_bytes())?,
        }
    }
    Ok(())
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue) {
    match value {
        GgufValue::U8(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::I8(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::U16(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::I16(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::U32(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::I32(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::F32(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::Bool(value) => bytes.push(u8::from(*value)),
        GgufValue::Text(text) => put_text(bytes, text),
        GgufValue::Array(kind, values) => {
            let kind = values.first().map_or(*kind, GgufValue::kind);
            bytes.extend(kind.to_le_bytes());
            bytes.extend((values.len() as u64).to_le_bytes());
            for value in values {
                put_value(bytes, value);
            }
        }
        GgufValue::U64(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::I64(value) => bytes.extend(value.to_le_bytes()),
        GgufValue::F64(value) => bytes.extend(value.to_le_bytes()),
    }
}
