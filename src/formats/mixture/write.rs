//! Writing an adapter's folder.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::checkpoint::RawTensor;
use crate::formats::mixture::adapter::MixtureAdapter;
use crate::formats::mixture::options::{LayerConfig, split};
use crate::formats::mixture::{FORMAT, FORMAT_VERSION};
use crate::formats::peft::{PREFIX, floats, folder};

impl MixtureAdapter {
    /// Writes an adapter's folder, which is made if it is not there, the tensors in 32 bits. While the files are exchanged for those of an older
    /// adapter the folder has no configuration: if the writer is killed then, it is not read as an adapter, and is to be written again.
    ///
    /// # Errors
    /// As [`MixtureAdapter::check`]; [`Error::Setting`] if there is no layer; [`Error::File`] if it cannot be written.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.check()?;
        let config = self.to_json()?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("format_version".to_owned(), FORMAT_VERSION.to_string()),
        ]);
        folder::write(folder.as_ref(), &self.raw_tensors()?, metadata, &config)
    }

    /// The contents of `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no layer.
    pub fn to_json(&self) -> Result<String> {
        let kind = self
            .kind()
            .ok_or_else(|| Error::setting("layers", 0, "an adapter has at least 1"))?;
        let configs = self.layers.iter().map(|(path, layer)| {
            let gate_of = self.blocks.get(path);
            (path, LayerConfig::of(layer, gate_of))
        });
        let (common, layers) = split(&configs.collect::<Vec<_>>());
        let mut object: Map<String, Value> = Map::new();
        object.insert("peft_type".to_owned(), kind.peft_type().into());
        object.insert("format".to_owned(), FORMAT.into());
        object.insert("format_version".to_owned(), FORMAT_VERSION.into());
        object.extend(common);
        object.insert("layer_options".to_owned(), Value::Object(layers));
        for (key, value) in &self.others {
            object.entry(key.clone()).or_insert_with(|| value.clone());
        }
        Ok(format!("{:#}\n", Value::Object(object)))
    }

    /// What is written, each tensor once: several layers can share one.
    fn raw_tensors(&self) -> Result<Vec<RawTensor<'_>>> {
        let mut written = BTreeSet::new();
        let mut tensors = Vec::new();
        for layer in self.layers.values() {
            for part in layer.parts()? {
                let name = part.store_name();
                let Some(tensor) = self.tensors.get(&name) else {
                    return Err(Error::UnknownName {
                        kind: "parameter",
                        name,
                    });
                };
                if !written.insert(name) {
                    continue;
                }
                let (count, _) = part.tensors();
                let whole = floats(format!("{PREFIX}{}", part.file_name(0)), tensor);
                if count == 1 && whole.shape.len() == part.tensors().1.len() {
                    tensors.push(whole);
                    continue;
                }
                let each = whole.bytes.len() / count;
                for expert in 0..count {
                    let range = expert * each..(expert + 1) * each;
                    tensors.push(RawTensor {
                        name: format!("{PREFIX}{}", part.file_name(expert)),
                        dtype: whole.dtype,
                        shape: whole.shape[1..].to_vec(),
                        bytes: match &whole.bytes {
                            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
                            Cow::Owned(bytes) => Cow::Owned(bytes[range].to_vec()),
                        },
                    });
                }
            }
        }
        Ok(tensors)
    }
}
