//! The layers of an adapter and their parameters.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::mixture::layer::{MixtureKind, MixtureLayer, Part};
use crate::formats::mixture::moe_peft_config::of_training;
use crate::formats::mixture::options::{LayerConfig, is_taken};
use crate::formats::mixture::read::MixtureConfig;
use crate::formats::peft::without_effect;
use crate::graph::ParameterStore;
use crate::tensor::{Tensor, TensorType};

/// Mixtures of LoRA experts on the linear layers of a model, all of one kind.
///
/// ```
/// use rankmix::formats::MixtureAdapter;
/// use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
/// use rankmix::{Device, Graph, ParameterStore, TensorType};
///
/// # fn main() -> rankmix::Result<()> {
/// let layer = RotMole::new(Linear::new("proj", 64, 32), AdapterOptions::new(8, 16.0), Routing::new(4, 2))?;
/// let mut graph = Graph::new();
/// let x = graph.input("x", TensorType::f32([16, 64]))?;
/// layer.forward(&mut graph, x)?;
/// let store = ParameterStore::new(&Device::cpu());
/// store.initialize(&graph, 42)?;
///
/// let adapter = MixtureAdapter::from_store(&store, [layer.into()])?;
/// # let folder = std::env::temp_dir().join(format!("rankmix-doc-{}", std::process::id()));
/// adapter.write(&folder)?;
/// let read = MixtureAdapter::read(&folder)?;
/// # std::fs::remove_dir_all(&folder).ok();
/// assert_eq!(read, adapter);
/// read.load_into(&store)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixtureAdapter {
    /// The layers by the path of the linear layer underneath, which is its name. A layer that was read has a frozen base.
    pub layers: BTreeMap<String, MixtureLayer>,
    /// The parameters by the names that they have in a store: `PATH.lora_a` and so on, as the layers' documentation says.
    pub tensors: BTreeMap<String, Tensor>,
    /// Layers whose gate is one of a block of several (MixLoRA), and the block's path: the gate reads what the block reads, and its
    /// choice is for the block as a whole. No layer of this crate computes that: see [`MixtureAdapter::load_into`].
    pub blocks: BTreeMap<String, String>,
    /// All other keys of `adapter_config.json`, to be written back.
    pub others: Map<String, Value>,
}

impl MixtureAdapter {
    /// An adapter of these layers, with their parameters as they are in a store now, in 32 bits.
    ///
    /// # Errors
    /// [`Error::DuplicateName`] if two layers have one name; [`Error::UnknownName`] if the store lacks a parameter, [`Error::TypeMismatch`]
    /// if one has another shape; [`Error::DeviceLost`] if the device is gone.
    pub fn from_store(
        store: &ParameterStore,
        layers: impl IntoIterator<Item = MixtureLayer>,
    ) -> Result<Self> {
        let mut adapter = Self::default();
        for layer in layers {
            for (name, _) in layer.parameters()? {
                if !adapter.tensors.contains_key(&name) {
                    let tensor = store.read(&name)?;
                    // The reference device computes in 64 bits.
                    let tensor = match tensor.as_f32() {
                        Some(_) => tensor,
                        None => Tensor::f32(tensor.shape(), tensor.to_f32())?,
                    };
                    adapter.tensors.insert(name.clone(), tensor);
                }
            }
            let path = layer.base().name.clone();
            if adapter.layers.insert(path.clone(), layer).is_some() {
                return Err(Error::DuplicateName {
                    name: path,
                    reason: "another layer of the adapter".to_owned(),
                });
            }
        }
        adapter.check()?;
        Ok(adapter)
    }

    /// Puts all parameters into a store, under the names that the layers look for.
    ///
    /// # Errors
    /// As [`MixtureAdapter::check`]; [`Error::Setting`] if there are [`MixtureAdapter::blocks`]; [`Error::TypeMismatch`] if the store has
    /// another shape under such a name, [`Error::OutOfMemory`] if the device is full.
    pub fn load_into(&self, store: &ParameterStore) -> Result<()> {
        if let Some((layer, block)) = self.blocks.first_key_value() {
            return Err(Error::setting(
                "gate_of",
                block,
                format!(
                    "the gate of `{layer}` chooses for all of `{block}` together, and layers of this crate choose each for itself; empty \
                     `blocks` to have each linear layer mixed by itself, which is something else unless each token takes one expert"
                ),
            ));
        }
        self.check()?;
        for (name, tensor) in &self.tensors {
            store.insert(name, tensor)?;
        }
        Ok(())
    }

    /// The kind of all layers; `None` if there is no layer.
    #[must_use]
    pub fn kind(&self) -> Option<MixtureKind> {
        self.layers.values().next().map(MixtureLayer::kind)
    }

    /// How many elements the parameters have.
    #[must_use]
    pub fn elements(&self) -> usize {
        let tensors = self.tensors.values();
        tensors.map(|tensor| tensor.shape().elements()).sum()
    }

    /// The keys of the configuration that neither this layout nor PEFT nor MoE-PEFT has: kept and without effect. To be shown as a warning.
    #[must_use]
    pub fn unknown_keys(&self) -> Vec<&str> {
        let keys = self.others.keys().map(String::as_str);
        keys.filter(|key| !without_effect(key) && !of_training(key))
            .collect()
    }

    /// Checks what reading checks: that the layers are of one kind, each under its own name and with options that make sense, and that the
    /// parameters are theirs: all there, of the right extents, floats of 32 bits, finite, and no others. What passes here is read as it was
    /// written, the base layers frozen.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Limit`], [`Error::UnknownName`], [`Error::TypeMismatch`] or [`Error::NotFinite`], with the layer's or the
    /// parameter's name.
    pub fn check(&self) -> Result<()> {
        let mut known = 0;
        let mut seen: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (path, layer) in &self.layers {
            if layer.base().name != *path {
                let reason = format!("the layer under this path is named `{}`", layer.base().name);
                return Err(Error::setting("layer", path, reason));
            }
            if Some(layer.kind()) != self.kind() {
                return Err(Error::setting(
                    "peft_type",
                    layer.kind().peft_type(),
                    format!("`{path}` is of another kind than the first layer; an adapter has one"),
                ));
            }
            self.check_options(path, layer)?;
            for part in layer.parts()? {
                let name = part.store_name();
                let tensor = self.tensors.get(&name).ok_or_else(|| Error::UnknownName {
                    kind: "parameter",
                    name: name.clone(),
                })?;
                let fits = self.fits(path, &part, tensor.shape().dims());
                if !fits || tensor.as_f32().is_none() {
                    return Err(Error::TypeMismatch {
                        name,
                        expected: TensorType::f32(part.dims),
                        found: tensor.ty(),
                    });
                }
                if let Some(element) = tensor.first_not_finite() {
                    return Err(Error::NotFinite {
                        value: format!("`{name}`"),
                        element,
                    });
                }
                known += usize::from(seen.insert(name, part.dims).is_none());
            }
        }
        if known != self.tensors.len() {
            let of_none = self.tensors.keys().find(|name| !seen.contains_key(*name));
            let name = of_none.cloned().unwrap_or_default();
            return Err(Error::setting("parameter", name, "no layer has it"));
        }
        let mut paths = self.blocks.keys();
        if let Some(path) = paths.find(|path| !self.layers.contains_key(*path)) {
            return Err(Error::setting("gate_of", path, "there is no such layer"));
        }
        self.check_text()
    }

    /// Checks a layer's description as reading does.
    fn check_options(&self, path: &str, layer: &MixtureLayer) -> Result<()> {
        let options = LayerConfig::of(layer, self.blocks.get(path));
        let (kind, base) = (layer.kind(), layer.base());
        let wrong = |reason: String| Error::setting("layer", path, reason);
        options
            .check(kind, path)
            .and_then(|()| options.layer(kind, path, [base.d_in, base.d_out]))
            .map_err(|error| wrong(error.to_string()))
            .and_then(|read| {
                if read == layer.frozen() {
                    return Ok(());
                }
                Err(wrong(format!(
                    "a file cannot say what it is: it would be read as {read:?}"
                )))
            })
    }

    /// Checks that the configuration's text says what there is, keys of others too.
    fn check_text(&self) -> Result<()> {
        if let Some(key) = self.others.keys().find(|key| is_taken(key)) {
            let reason = "a key of others cannot have a name that this layout gives a meaning";
            return Err(Error::setting("others", key, reason));
        }
        if self.layers.is_empty() {
            return Ok(());
        }
        let wrong = |reason: String| Error::setting("others", "", reason);
        let object = serde_json::from_str(&self.to_json()?);
        let read = object.map_err(|error| wrong(error.to_string()))?;
        let read = MixtureConfig::of(read).map_err(wrong)?;
        for (path, layer) in &self.layers {
            let written = LayerConfig::of(layer, self.blocks.get(path));
            let read = read.layer(path);
            let wrong = |reason: String| Error::setting("layer", path, reason);
            if read.map_err(wrong)? != written {
                return Err(wrong("its options change in a file".to_owned()));
            }
        }
        if read.others() != &self.others {
            return Err(wrong("keys of others change in a file".to_owned()));
        }
        Ok(())
    }

    /// Whether a parameter of the layer `path` may have these extents. A block's gate is as wide as what the block reads.
    fn fits(&self, path: &str, part: &Part, dims: &[usize]) -> bool {
        if part.parameter == "router" && self.blocks.contains_key(path) {
            return dims.len() == 2 && dims[0] == part.dims[0];
        }
        dims == part.dims
    }
}

/// Paths are names of modules with dots between them.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    let odd = |part: &str| {
        part.is_empty() || part.contains(|c: char| c.is_control() || matches!(c, '/' | '\\'))
    };
    if path.split('.').any(odd) {
        return Err("a path is made of names with dots between them".to_owned());
    }
    Ok(())
}
