//! Reading an adapter's folder. Nothing is allocated by a number of the configuration before the tensors that it promises are found.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::checkpoint::Checkpoint;
use crate::formats::mixture::adapter::MixtureAdapter;
use crate::formats::mixture::layer::{MixtureKind, Part};
use crate::formats::mixture::options::{KEYS, LayerConfig, join};
use crate::formats::mixture::{FORMAT, FORMAT_VERSION, GATE};
use crate::formats::peft::{PREFIX, factor, folder};
use crate::tensor::Tensor;

/// `adapter_config.json`, checked as far as it can be without the tensors.
#[derive(Debug)]
pub(crate) struct MixtureConfig {
    kind: MixtureKind,
    common: Map<String, Value>,
    layers: Map<String, Value>,
    others: Map<String, Value>,
}

impl MixtureConfig {
    /// Reads the object of the file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn of(mut object: Map<String, Value>) -> Result<Self, String> {
        let kind = match object.remove("peft_type") {
            Some(Value::String(name)) => {
                let mut kinds = MixtureKind::ALL.into_iter();
                kinds.find(|kind| kind.peft_type() == name).ok_or_else(|| {
                    format!("peft_type is \"{name}\", MOE_LORA, ROTMOLE and COMOL are read here")
                })?
            }
            Some(other) => return Err(format!("peft_type is {other}, expected a name")),
            None => return Err("there is no peft_type".to_owned()),
        };
        // First of all: another version may have other keys.
        let shown = |value: Option<Value>| value.map_or("missing".to_owned(), |v| v.to_string());
        let format = object.remove("format");
        if format.as_ref().and_then(Value::as_str) != Some(FORMAT) {
            return Err(format!(
                "format is {}, expected \"{FORMAT}\"",
                shown(format)
            ));
        }
        let version = object.remove("format_version");
        if version.as_ref().and_then(Value::as_u64) != Some(FORMAT_VERSION) {
            return Err(format!(
                "format_version is {}, version {FORMAT_VERSION} is read",
                shown(version)
            ));
        }
        let layers = match object.remove("layer_options") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(layers)) => layers,
            Some(other) => return Err(format!("layer_options is {other}, expected an object")),
        };
        let (common, others) = object
            .into_iter()
            .partition(|(key, _)| KEYS.contains(&key.as_str()));
        Ok(Self {
            kind,
            common,
            layers,
            others,
        })
    }

    /// Keys of others.
    pub(crate) fn others(&self) -> &Map<String, Value> {
        &self.others
    }

    /// The options of a layer.
    pub(crate) fn layer(&self, path: &str) -> Result<LayerConfig, String> {
        let own = match self.layers.get(path) {
            None => None,
            Some(Value::Object(own)) => Some(own),
            Some(other) => return Err(format!("expected an object, found {other}")),
        };
        join(&self.common, own)
    }
}

impl MixtureAdapter {
    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read; [`Error::Format`] if one is damaged or of another version, the configuration makes no
    /// sense, or a tensor is missing, of other extents than the configuration says, not finite, or of no layer.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let opened = folder::open(folder.as_ref(), MixtureConfig::of)?;
        Self::from_checkpoint(opened.config, &opened.path, &opened.tensors)
    }

    /// The adapter of a configuration, which is at `path`, and an open file.
    pub(crate) fn from_checkpoint(
        config: MixtureConfig,
        path: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.to_owned(),
            reason,
        };
        check_metadata(checkpoint)?;
        let mut unread = BTreeSet::new();
        for (name, _) in checkpoint.tensors() {
            let short = name.strip_prefix(PREFIX).ok_or_else(|| {
                let reason = format!("the name does not begin with {PREFIX}");
                checkpoint.wrong(name, &reason)
            })?;
            unread.insert(short.to_owned());
        }
        let gates = unread.iter().filter_map(|name| name.strip_suffix(GATE));
        let paths: Vec<String> = gates.map(ToOwned::to_owned).collect();
        if let Some(path) = config.layers.keys().find(|path| !paths.contains(path)) {
            return Err(wrong(format!(
                "layer_options is for `{path}`, which has no tensor `{PREFIX}{path}{GATE}`"
            )));
        }
        if paths.is_empty() {
            return Err(
                checkpoint.fault(format!("no tensor is named ...{GATE}: there is no layer"))
            );
        }
        let mut adapter = Self {
            others: config.others.clone(),
            ..Self::default()
        };
        for path in paths {
            let wrong = |reason: String| wrong(format!("the options of `{path}`: {reason}"));
            let options = config.layer(&path).map_err(wrong)?;
            options
                .check(config.kind, &path)
                .map_err(|error| wrong(error.to_string()))?;
            let widths = widths(checkpoint, &options.width_tensors(config.kind, &path))?;
            let layer = options
                .layer(config.kind, &path, widths)
                .map_err(|error| wrong(error.to_string()))?;
            let parts = layer.parts().map_err(|error| wrong(error.to_string()))?;
            for mut part in parts {
                if part.parameter == "router" && options.gate_of().is_some() {
                    // A block's gate is as wide as what the block reads.
                    let gate = format!("{PREFIX}{}", part.file_name(0));
                    part.dims[1] = checkpoint.matrix(&gate)?[1];
                }
                let tensor = match adapter.tensors.get(&part.store_name()) {
                    None => read_part(checkpoint, &part)?,
                    Some(shared) if shared.shape().dims() == part.dims => continue,
                    Some(shared) => {
                        return Err(wrong(format!(
                            "`{}` is shared as {:?}, this layer's is {:?}",
                            part.store_name(),
                            shared.shape().dims(),
                            part.dims
                        )));
                    }
                };
                adapter.tensors.insert(part.store_name(), tensor);
                for expert in 0..part.tensors().0 {
                    unread.remove(&part.file_name(expert));
                }
            }
            if let Some(block) = options.gate_of() {
                adapter.blocks.insert(path.clone(), block.clone());
            }
            adapter.layers.insert(path, layer);
        }
        match unread.first() {
            None => Ok(adapter),
            Some(name) => Err(checkpoint.wrong(
                &format!("{PREFIX}{name}"),
                "no layer of the configuration has it",
            )),
        }
    }
}

/// What the file itself says that it is.
fn check_metadata(checkpoint: &Checkpoint) -> Result<()> {
    for (key, expected) in [
        ("format", FORMAT.to_owned()),
        ("format_version", FORMAT_VERSION.to_string()),
    ] {
        let found = checkpoint.metadata().get(key);
        if found != Some(&expected) {
            let found = found.map_or("missing", |found| found);
            return Err(checkpoint.fault(format!(
                "{key} in the metadata is {found}, {expected} is read"
            )));
        }
    }
    Ok(())
}

/// The widths of a layer's input and output.
fn widths(checkpoint: &Checkpoint, [a, b]: &[String; 2]) -> Result<[usize; 2]> {
    let extents = |name: &str| checkpoint.matrix(&format!("{PREFIX}{name}"));
    Ok([extents(a)?[1], extents(b)?[0]])
}

fn read_part(checkpoint: &Checkpoint, part: &Part) -> Result<Tensor> {
    let (count, each) = part.tensors();
    let name = |expert| format!("{PREFIX}{}", part.file_name(expert));
    read_tensors(checkpoint, name, count, each, &part.dims)
}

/// Several tensors of extents `each`, one after another, as one of extents `dims`.
pub(crate) fn read_tensors(
    checkpoint: &Checkpoint,
    name: impl Fn(usize) -> String,
    count: usize,
    each: &[usize],
    dims: &[usize],
) -> Result<Tensor> {
    // All are known to be there before anything is allocated.
    for number in 0..count {
        let name = name(number);
        let Some(entry) = checkpoint.entry(&name) else {
            return Err(checkpoint.wrong(&name, "it is missing"));
        };
        if entry.shape != each {
            let reason = format!("{:?}, the configuration says {each:?}", entry.shape);
            return Err(checkpoint.wrong(&name, &reason));
        }
    }
    let mut elements = Vec::new();
    for number in 0..count {
        elements.extend(factor(checkpoint, &name(number))?.to_f32());
    }
    Tensor::f32(dims, elements)
}
