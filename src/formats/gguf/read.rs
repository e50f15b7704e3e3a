//! The header of a GGUF file. Nothing is allocated by a length that the file gives before that many bytes are known to be there.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use crate::error::{Error, Result};
use crate::formats::file_bytes::FileBytes;
use crate::formats::gguf::{
    ALIGNMENT, ALIGNMENT_KEY, GgufFile, GgufLora, GgufTensor, GgufType, GgufValue, MAGIC,
    MOST_DIMENSIONS, VERSION,
};

/// Arrays in arrays beyond this depth are refused: they could exhaust the stack.
const MOST_DEPTH: usize = 8;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    fn wrong(&self, reason: &str) -> Error {
        Error::Format {
            path: self.path.to_owned(),
            reason: format!("byte {}: {reason}", self.at),
        }
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        if count > left {
            return Err(self.wrong(&format!(
                "{what} takes {count} bytes, {left} are left: the file is truncated or a length is wrong"
            )));
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(N, what)?;
        Ok(taken
            .try_into()
            .expect("`take` returns as many bytes as it was asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things of at least so many bytes each, of which there cannot be more than the rest of the file has room for.
    fn count(&mut self, least_bytes: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let left = self.bytes.len() - self.at;
        match usize::try_from(count) {
            Ok(count) if count <= left / least_bytes => Ok(count),
            _ => Err(self.wrong(&format!(
                "{what} is {count}, the {left} bytes left have room for {}",
                left / least_bytes
            ))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(1, &format!("the length of {what}"))?;
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.wrong(&format!("{what} is no UTF-8: {error}"))),
        }
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<GgufValue> {
        Ok(match kind {
            0 => GgufValue::U8(self.array::<1>(key)?[0]),
            1 => GgufValue::I8(i8::from_le_bytes(self.array(key)?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.array(key)?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.array(key)?)),
            4 => GgufValue::U32(self.u32(key)?),
            5 => GgufValue::I32(i32::from_le_bytes(self.array(key)?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array::<1>(key)?[0] {
                0 => GgufValue::Bool(false),
                1 => GgufValue::Bool(true),
                other => {
                    return Err(self.wrong(&format!("`{key}` is the truth value {other}")));
                }
            },
            8 => GgufValue::Text(self.text(key)?),
            9 => {
                if depth == MOST_DEPTH {
                    return Err(self.wrong(&format!(
                        "`{key}` has arrays in more than {MOST_DEPTH} arrays"
                    )));
                }
                let kind = self.u32(key)?;
                let Some(least) = least_bytes(kind) else {
                    return Err(self.wrong(&format!("`{key}` is an array of unknown kind {kind}")));
                };
                let length = self.count(least, &format!("the length of `{key}`"))?;
                // Not with a capacity: what is there of each value is known only when it has been read.
                let mut values = Vec::new();
                for _ in 0..length {
                    values.push(self.value(kind, key, depth + 1)?);
                }
                GgufValue::Array(kind, values)
            }
            10 => GgufValue::U64(self.u64(key)?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array(key)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.wrong(&format!("`{key}` is of unknown kind {kind}"))),
        })
    }
}

/// The fewest bytes that a value of a kind can take.
fn least_bytes(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => return None,
    })
}

pub(crate) fn parse(bytes: FileBytes, path: &Path) -> Result<GgufFile> {
    let mut cursor = Cursor {
        bytes: &bytes,
        at: 0,
        path,
    };
    let magic: [u8; 4] = cursor.array("the magic")?;
    if &magic != MAGIC {
        cursor.at = 0;
        return Err(cursor.wrong(&format!(
            "starts with {:?}, a GGUF file starts with \"GGUF\"",
            String::from_utf8_lossy(&magic)
        )));
    }
    let version = cursor.u32("the version")?;
    // Version 2 differs in nothing but what big-endian files may be.
    if !(2..=VERSION).contains(&version) {
        return Err(cursor.wrong(&format!("version {version}; 2 and {VERSION} are read")));
    }
    // Name, dimensions, type, offset; key, kind, value.
    let tensor_count = cursor.count(8 + 4 + 4 + 8, "the number of tensors")?;
    let value_count = cursor.count(8 + 4 + 1, "the number of metadata values")?;
    let mut metadata: Vec<(String, GgufValue)> = Vec::new();
    let mut keys = HashSet::new();
    for _ in 0..value_count {
        let key = cursor.text("a metadata key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key, 0)?;
        if !keys.insert(key.clone()) {
            return Err(cursor.wrong(&format!("the metadata key `{key}` is there twice")));
        }
        metadata.push((key, value));
    }
    let alignment = match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => ALIGNMENT,
        Some((_, value)) => match value.as_u64() {
            Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => alignment,
            _ => {
                return Err(cursor.wrong(&format!(
                    "{ALIGNMENT_KEY} is {value:?}, expected a power of two up to 1048576"
                )));
            }
        },
    };
    let mut tensors = Vec::new();
    let mut places = HashMap::new();
    for place in 0..tensor_count {
        let (name, tensor) = tensor(&mut cursor, alignment)?;
        if places.insert(name.clone(), place).is_some() {
            return Err(cursor.wrong(&format!("tensor `{name}` is there twice")));
        }
        tensors.push((name, tensor));
    }
    let start = (cursor.at as u64).next_multiple_of(alignment);
    place(&mut tensors, start, bytes.len() as u64, path)?;
    Ok(GgufFile {
        path: path.to_owned(),
        metadata,
        tensors,
        places,
        bytes,
    })
}

/// One entry of the list of tensors; its offset is from the beginning of the data still.
fn tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<(String, GgufTensor)> {
    let name = cursor.text("a tensor's name")?;
    let rank = cursor.u32(&name)? as usize;
    if rank > MOST_DIMENSIONS {
        return Err(cursor.wrong(&format!(
            "tensor `{name}` has {rank} dimensions, at most {MOST_DIMENSIONS} are allowed"
        )));
    }
    let mut shape = Vec::with_capacity(rank);
    for _ in 0..rank {
        shape.push(cursor.u64(&name)?);
    }
    let ty = GgufType::of_number(cursor.u32(&name)?);
    let offset = cursor.u64(&name)?;
    if !offset.is_multiple_of(alignment) {
        return Err(cursor.wrong(&format!(
            "tensor `{name}` is at offset {offset}, which is no multiple of {alignment}"
        )));
    }
    // Innermost first in the file.
    shape.reverse();
    let extents: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let elements = extents.as_ref().and_then(|extents| {
        let mut extents = extents.iter();
        extents.try_fold(1_usize, |product, &n| product.checked_mul(n))
    });
    let (Some(extents), Some(elements)) = (extents, elements) else {
        return Err(cursor.wrong(&format!(
            "tensor `{name}` has the shape {shape:?}: so many elements cannot be counted"
        )));
    };
    let bytes = match ty.block() {
        None => 0,
        Some((block, block_bytes)) => {
            let row = extents.last().copied().unwrap_or(1);
            if !row.is_multiple_of(block) {
                return Err(cursor.wrong(&format!(
                    "tensor `{name}` has rows of {row} elements, {ty} is in blocks of {block}"
                )));
            }
            match (elements / block).checked_mul(block_bytes) {
                Some(bytes) => bytes,
                None => {
                    return Err(cursor.wrong(&format!(
                        "tensor `{name}` has the shape {shape:?}: so many bytes cannot be counted"
                    )));
                }
            }
        }
    };
    let tensor = GgufTensor {
        shape: extents,
        ty,
        offset,
        bytes,
    };
    Ok((name, tensor))
}

/// Turns offsets into positions in the file, and checks that every tensor lies in it and none lies in another.
fn place(tensors: &mut [(String, GgufTensor)], start: u64, length: u64, path: &Path) -> Result<()> {
    let wrong = |reason: String| Error::Format {
        path: path.to_owned(),
        reason,
    };
    for (name, tensor) in tensors.iter_mut() {
        let end = start
            .checked_add(tensor.offset)
            .and_then(|at| at.checked_add(tensor.bytes as u64));
        match end {
            Some(end) if end <= length => tensor.offset += start,
            _ => {
                return Err(wrong(format!(
                    "tensor `{name}` at offset {} after byte {start} takes {} bytes, the file ends at byte {length}",
                    tensor.offset, tensor.bytes
                )));
            }
        }
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| tensors[index].1.offset);
    for pair in order.windows(2) {
        let [(one, first), (other, second)] = [pair[0], pair[1]].map(|index| &tensors[index]);
        if first.offset + first.bytes as u64 > second.offset {
            return Err(wrong(format!(
                "tensors `{one}` (bytes {} to {}) and `{other}` (from byte {}) overlap",
                first.offset,
                first.offset + first.bytes as u64,
                second.offset
            )));
        }
    }
    Ok(())
}

pub(crate) fn lora(file: &GgufFile) -> Result<(f32, Vec<GgufLora>)> {
    let wrong = |reason: String| Error::Format {
        path: file.path.clone(),
        reason,
    };
    let text = |key: &str| file.value(key).and_then(GgufValue::as_text);
    if text("general.type") != Some("adapter") {
        return Err(wrong(format!(
            "general.type is {:?}, that of an adapter is \"adapter\"",
            text("general.type")
        )));
    }
    let kind = text("adapter.type");
    if kind.is_some_and(|kind| kind != "lora") {
        return Err(wrong(format!("adapter.type is {kind:?}, \"lora\" is read")));
    }
    let alpha = file.value("adapter.lora.alpha").and_then(GgufValue::as_f64);
    let Some(alpha) = alpha.filter(|alpha| alpha.is_finite()) else {
        return Err(wrong(format!(
            "adapter.lora.alpha is {:?}, expected a finite float",
            file.value("adapter.lora.alpha")
        )));
    };
    let mut pairs = Vec::new();
    for (name, _) in file.tensors() {
        let (a, b) = (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b"));
        let Some(weight) = a.or(b) else {
            return Err(wrong(format!(
                "tensor `{name}` is neither the lora_a nor the lora_b of a weight"
            )));
        };
        let partner = format!("{weight}.{}", if a.is_some() { "lora_b" } else { "lora_a" });
        if !file.places.contains_key(&partner) {
            return Err(wrong(format!("tensor `{name}` has no `{partner}`")));
        }
        // Each pair once, where its A is.
        if b.is_some() {
            continue;
        }
        let (a, b) = (file.tensor(name)?, file.tensor(&partner)?);
        match (a.shape().dims(), b.shape().dims()) {
            ([rank, _], [_, other]) if rank == other => pairs.push(GgufLora {
                weight: weight.to_owned(),
                a,
                b,
            }),
            (a, b) => {
                return Err(wrong(format!(
                    "`{name}` {a:?} and `{partner}` {b:?} are not [rank, d_in] and [d_out, rank]"
                )));
            }
        }
    }
    Ok((alpha as f32, pairs))
}
