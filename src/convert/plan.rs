//! Which files a converted model is in, and what is in each.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::convert::LayerReport;
use crate::error::Result;
use crate::file::damaged;
use crate::formats::{Checkpoint, ModelWriter, MoeLayer, MoeModel, latent_parts};

/// Layers of two versions do not belong in one model. To be counted up whenever a layer's result changes in any bit (grouping, singular vectors, refitting,
/// rounding), between two versions of this package too: a conversion that was interrupted is then not gone on with.
pub(crate) const ARITHMETIC_VERSION: u32 = 1;
/// What a file of tensors that are only copied holds at the most, unless one tensor is larger.
const SHARD_BYTES: usize = 512 << 20;
/// The metadata of a converted layer's file that holds its [`LayerRecord`].
pub(crate) const RECORD: &str = "rankmix_layer";

/// What is kept of a converted layer, in the metadata of its file, so that both are there or neither.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) path: String,
    pub(crate) report: LayerReport,
}

/// What the files hold.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Tensors copied from the source.
    Copied(Vec<String>),
    /// The latent experts of a layer, by its number among the mixtures.
    Layer(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) file: String,
    pub(crate) content: Content,
}

/// The sizes of converted layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentWidths {
    pub(crate) groups: usize,
    pub(crate) latent: usize,
    pub(crate) factored_down: bool,
}

/// The names of a model's tensors but those that are left out, in groups of at most [`SHARD_BYTES`], or of one tensor.
pub(crate) fn grouped(
    checkpoint: &Checkpoint,
    is_taken: impl Fn(&str) -> bool,
) -> Vec<Vec<String>> {
    let mut groups = Vec::new();
    let (mut names, mut bytes) = (Vec::new(), 0);
    for (name, entry) in checkpoint.tensors() {
        if !is_taken(name) {
            continue;
        }
        if bytes + entry.bytes() > SHARD_BYTES && !names.is_empty() {
            groups.push(std::mem::take(&mut names));
            bytes = 0;
        }
        names.push(name.to_owned());
        bytes += entry.bytes();
    }
    if !names.is_empty() {
        groups.push(names);
    }
    groups
}

/// First what is copied, in files of at most [`SHARD_BYTES`], then a file for each layer.
pub(crate) fn shards(model: &MoeModel) -> Vec<Shard> {
    let experts: std::collections::HashSet<&str> =
        model.layers().iter().flat_map(MoeLayer::tensors).collect();
    let copied = grouped(model.checkpoint(), |name| !experts.contains(name));
    let mut contents: Vec<Content> = copied.into_iter().map(Content::Copied).collect();
    contents.extend((0..model.layers().len()).map(Content::Layer));
    let count = contents.len();
    let numbered = contents.into_iter().enumerate();
    numbered
        .map(|(index, content)| Shard {
            file: ModelWriter::shard_name(index + 1, count),
            content,
        })
        .collect()
}

/// The type that a layer is written in.
pub(crate) fn dtype_of(layer: &MoeLayer, chosen: Option<Dtype>) -> Dtype {
    let kept = match layer.dtype {
        dtype @ (Dtype::F16 | Dtype::BF16) => dtype,
        _ => Dtype::F32,
    };
    chosen.unwrap_or(kept)
}

impl LatentWidths {
    /// Whether the file of a layer's latent experts has exactly the tensors that it must have.
    fn are_those_of(self, layer: &MoeLayer, file: &Checkpoint, dtype: Dtype) -> bool {
        let widths = [layer.hidden, layer.intermediate, self.latent];
        let mut count = 0;
        for part in latent_parts(layer.experts, self.groups, widths, self.factored_down) {
            for name in part.names(&layer.path) {
                let entry = file.entry(&name);
                if entry.is_none_or(|entry| entry.shape != part.shape || entry.dtype != dtype) {
                    return false;
                }
                count += 1;
            }
        }
        file.tensors().count() == count
    }
}

/// The record in a layer's file.
pub(crate) fn record_of<T: DeserializeOwned>(file: &Checkpoint, path: &Path) -> Result<T> {
    let text = file
        .metadata()
        .get(RECORD)
        .ok_or_else(|| damaged(path)(format!("there is no `{RECORD}` in its metadata")))?;
    serde_json::from_str(text).map_err(|error| damaged(path)(format!("`{RECORD}`: {error}")))
}

/// Whether a run before this one has written the file: it is whole, because files get their names when they are, and holds what it must.
pub(crate) fn is_written(
    shard: &Shard,
    folder: &Path,
    model: &MoeModel,
    widths: LatentWidths,
    dtype: Option<Dtype>,
) -> bool {
    let path = folder.join(&shard.file);
    // Whatever is wrong with it, it is written again.
    let Ok(file) = Checkpoint::open(&path) else {
        return false;
    };
    match &shard.content {
        Content::Copied(names) => {
            let same = |name: &String| {
                let (found, source) = (file.entry(name), model.checkpoint().entry(name));
                found.zip(source).is_some_and(|(found, source)| {
                    found.dtype == source.dtype && found.shape == source.shape
                })
            };
            file.tensors().count() == names.len() && names.iter().all(same)
        }
        Content::Layer(number) => model.layers().get(*number).is_some_and(|layer| {
            widths.are_those_of(layer, &file, dtype_of(layer, dtype))
                && record_of(&file, &path)
                    .is_ok_and(|record: LayerRecord| record.path == layer.path)
        }),
    }
}
