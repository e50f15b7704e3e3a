//! Which layers of a model are mixtures of experts by its `config.json`, held against those that its tensors have.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::formats::moe::config::MoeConfig;
use crate::formats::moe::scan::MoeLayer;

/// The families whose rule is the one below; others may leave layers dense by keys that are not known here.
const FAMILIES: [&str; 6] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
];
/// The keys of the rule.
const KEYS: [&str; 5] = [
    "mlp_layer_types",
    "mlp_only_layers",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "moe_layer_freq",
];

/// The largest number of layers that is believed: beyond it a file is damaged.
const MOST_LAYERS: usize = 1 << 16;

/// The rule that leaves some layers dense.
struct Rule {
    /// `sparse` or `dense` for each layer: with it the other keys mean nothing.
    kinds: Option<Vec<String>>,
    dense: BTreeSet<usize>,
    /// Of each so many layers the last one.
    step: usize,
    first: usize,
    /// Layers whose number it divides.
    frequency: usize,
}

impl Rule {
    fn of(config: &MoeConfig) -> Result<Self> {
        let [_, only, step, first, frequency] = KEYS;
        let positive = |key: &str| match config.typed::<usize>(key)? {
            Some(0) => Err(config.wrong(format!("`{key}` = 0: must be at least 1"))),
            other => Ok(other.unwrap_or(1)),
        };
        // What transformers takes.
        let dense_at_first = match config.model_type() {
            "deepseek_v3" => 3,
            _ => 0,
        };
        Ok(Self {
            kinds: config.typed(KEYS[0])?,
            dense: config.typed(only)?.unwrap_or_default(),
            step: positive(step)?,
            first: config.typed(first)?.unwrap_or(dense_at_first),
            frequency: positive(frequency)?,
        })
    }

    fn is_mixture(&self, layer: usize) -> bool {
        if let Some(kinds) = &self.kinds {
            return kinds.get(layer).is_some_and(|kind| kind == "sparse");
        }
        layer >= self.first
            && layer.is_multiple_of(self.frequency)
            && (layer + 1).is_multiple_of(self.step)
            && !self.dense.contains(&layer)
    }
}

/// The number behind `layers.` in a path.
fn number_of(path: &str) -> Option<usize> {
    let mut parts = path.split('.');
    parts.find(|part| *part == "layers")?;
    parts.next()?.parse().ok()
}

impl MoeConfig {
    /// Checks that the layers that are mixtures by their tensors are those that are by the configuration: one whose router and experts are all missing would
    /// count as dense otherwise. Layers past `num_hidden_layers`, which predict further tokens, are not judged; nor are families whose
    /// rule is not known.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) with the number of the first layer that is of the other kind.
    pub(crate) fn check_mixtures(&self, found: &[MoeLayer]) -> Result<()> {
        let Some(layers) = self.typed::<usize>("num_hidden_layers")? else {
            return Ok(());
        };
        if !FAMILIES.contains(&self.model_type()) {
            return Ok(());
        }
        if layers > MOST_LAYERS {
            return Err(self.wrong(format!(
                "`num_hidden_layers` = {layers}: at most {MOST_LAYERS} are believed"
            )));
        }
        let rule = Rule::of(self)?;
        let found: BTreeSet<usize> = found
            .iter()
            .filter_map(|layer| number_of(&layer.path))
            .collect();
        let Some(odd) = (0..layers).find(|layer| rule.is_mixture(*layer) != found.contains(layer))
        else {
            return Ok(());
        };
        let said = KEYS
            .iter()
            .filter_map(|key| Some(format!("`{key}` = {}", self.value(key)?)))
            .collect::<Vec<_>>();
        let said = if said.is_empty() {
            format!("a \"{}\" without further keys", self.model_type())
        } else {
            said.join(", ")
        };
        let [is, has] = if found.contains(&odd) {
            ["dense", "has experts"]
        } else {
            ["a mixture of experts", "has neither a router nor experts"]
        };
        Err(self.wrong(format!(
            "{said}: layer {odd} of {layers} is {is}, and the checkpoint {has} there"
        )))
    }
}
