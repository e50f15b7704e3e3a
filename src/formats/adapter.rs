//! An adapter of whatever kind is in a folder.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file;
use crate::formats::checkpoint::Checkpoint;
use crate::formats::mixture::{MixtureAdapter, MixtureConfig, MoePeftAdapter, MoePeftConfig};
use crate::formats::peft::{CONFIG, LoraConfig, PeftAdapter, open_tensors};

/// An adapter of one of the kinds that are read; `peft_type` in `adapter_config.json` says which it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Adapter {
    /// Plain LoRA of PEFT.
    Lora(PeftAdapter),
    /// A mixture in our layout.
    Mixture(MixtureAdapter),
    /// MixLoRA or MoLA of MoE-PEFT.
    MoePeft(MoePeftAdapter),
}

impl Adapter {
    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read; [`Error::Format`] if `peft_type` is none that is known, and as [`PeftAdapter::read`],
    /// [`MixtureAdapter::read`] and [`MoePeftAdapter::read`].
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::open(folder)?.0)
    }

    /// Reads an adapter's folder, and gives out the open file of its tensors too.
    ///
    /// # Errors
    /// As [`Adapter::read`].
    pub fn open(folder: impl AsRef<Path>) -> Result<(Self, Checkpoint)> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let wrong = |reason: String| Error::Format {
            path: path.clone(),
            reason,
        };
        let json = file::read_text(&path)?;
        let object: Map<String, Value> =
            serde_json::from_str(&json).map_err(|error| wrong(error.to_string()))?;
        match object.get("peft_type").and_then(Value::as_str) {
            Some("MOE_LORA" | "ROTMOLE" | "COMOL") => {
                let config = MixtureConfig::of(object).map_err(wrong)?;
                let tensors = open_tensors(folder)?;
                let adapter = MixtureAdapter::from_checkpoint(config, &path, &tensors)?;
                Ok((Self::Mixture(adapter), tensors))
            }
            Some("MIXLORA" | "MOLA") => {
                let config = MoePeftConfig::of(object).map_err(wrong)?;
                let tensors = open_tensors(folder)?;
                let adapter = MoePeftAdapter::from_checkpoint(config, &path, &tensors)?;
                Ok((Self::MoePeft(adapter), tensors))
            }
            _ => {
                let config = LoraConfig::from_json(&json, &path)?;
                let tensors = open_tensors(folder)?;
                let adapter = PeftAdapter::from_checkpoint(config, &tensors)?;
                Ok((Self::Lora(adapter), tensors))
            }
        }
    }
}
