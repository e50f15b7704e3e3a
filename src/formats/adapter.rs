//! An adapter of whatever kind is in a folder.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::formats::checkpoint::Checkpoint;
use crate::formats::mixture::{MixtureAdapter, MixtureConfig, MoePeftAdapter, MoePeftConfig};
use crate::formats::peft::folder::{self, Opened};
use crate::formats::peft::{LoraConfig, PeftAdapter};

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
    /// [`Error::File`](crate::Error::File) if a file cannot be read; [`Error::Format`](crate::Error::Format) if `peft_type` is none that is known, and as [`PeftAdapter::read`],
    /// [`MixtureAdapter::read`] and [`MoePeftAdapter::read`].
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::open(folder)?.0)
    }

    /// Reads an adapter's folder, and gives out the open file of its tensors too.
    ///
    /// # Errors
    /// As [`Adapter::read`].
    pub fn open(folder: impl AsRef<Path>) -> Result<(Self, Checkpoint)> {
        let Opened {
            path,
            config,
            tensors,
        } = folder::open(folder.as_ref(), Config::of)?;
        let adapter = match config {
            Config::Lora(config) => Self::Lora(PeftAdapter::from_checkpoint(config, &tensors)?),
            Config::Mixture(config) => {
                Self::Mixture(MixtureAdapter::from_checkpoint(config, &path, &tensors)?)
            }
            Config::MoePeft(config) => {
                Self::MoePeft(MoePeftAdapter::from_checkpoint(config, &path, &tensors)?)
            }
        };
        Ok((adapter, tensors))
    }
}

/// The configuration of an adapter of whatever kind.
enum Config {
    Lora(LoraConfig),
    Mixture(MixtureConfig),
    MoePeft(MoePeftConfig),
}

impl Config {
    fn of(object: Map<String, Value>) -> Result<Self, String> {
        match object.get("peft_type").and_then(Value::as_str) {
            Some("MOE_LORA" | "ROTMOLE" | "COMOL") => MixtureConfig::of(object).map(Self::Mixture),
            Some("MIXLORA" | "MOLA") => MoePeftConfig::of(object).map(Self::MoePeft),
            _ => LoraConfig::of(object).map(Self::Lora),
        }
    }
}
