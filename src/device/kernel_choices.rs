//! Which kernels an adapter is known to do best with, where an operation has several.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::AdapterSummary;
use crate::error::{Error, Result};
use crate::file;

const FORMAT: &str = "rankmix kernels";
const VERSION: u32 = 1;

/// The operations that have several kernels for the same work, by [`Choice::key`](crate::ops::Choice), and the kernel that each is to take. What is not
/// named, or names a kernel that cannot do it, is left to the operation's own rule; results differ between kernels by rounding alone.
///
/// Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelChoices {
    of_operation: Arc<BTreeMap<String, String>>,
    /// What stands behind the keys that [`KernelChoices::get`] is asked for.
    behind: String,
}

impl KernelChoices {
    /// The kernel that an operation is to take.
    #[must_use]
    pub fn get(&self, operation: &str) -> Option<&str> {
        let chosen = if self.behind.is_empty() {
            self.of_operation.get(operation)
        } else {
            self.of_operation
                .get(&format!("{operation}{}", self.behind))
        };
        chosen.map(String::as_str)
    }

    /// The same choices, asked for with this behind each key.
    pub(crate) fn with_behind(&self, behind: String) -> Self {
        Self {
            of_operation: Arc::clone(&self.of_operation),
            behind,
        }
    }

    /// Names the kernel that an operation is to take.
    pub fn insert(&mut self, operation: impl Into<String>, kernel: impl Into<String>) {
        Arc::make_mut(&mut self.of_operation).insert(operation.into(), kernel.into());
    }

    /// Takes over every choice of the other; where both name an operation, that of the other.
    pub fn extend(&mut self, other: &Self) {
        for (operation, kernel) in other.iter() {
            self.insert(operation, kernel);
        }
    }

    /// Operations and their kernels, in the order of the operations' names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let pairs = self.of_operation.iter();
        pairs.map(|(operation, kernel)| (operation.as_str(), kernel.as_str()))
    }

    /// How many operations are named.
    #[must_use]
    pub fn len(&self) -> usize {
        self.of_operation.len()
    }

    /// Whether everything is left to the operations' own rules.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.of_operation.is_empty()
    }
}

/// The choices of any number of adapters, as a JSON file that can be shipped with an application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunedKernels {
    format: String,
    version: u32,
    /// By "NAME (BACKEND)". A driver's version is not part of it: at worst a choice is no longer the fastest.
    adapters: BTreeMap<String, BTreeMap<String, String>>,
}

impl Default for TunedKernels {
    fn default() -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            adapters: BTreeMap::new(),
        }
    }
}

impl TunedKernels {
    fn adapter_key(adapter: &AdapterSummary) -> String {
        format!("{} ({})", adapter.name, adapter.backend)
    }

    /// The choices for an adapter; none if it was never tuned.
    #[must_use]
    pub fn choices(&self, adapter: &AdapterSummary) -> KernelChoices {
        let found = self.adapters.get(&Self::adapter_key(adapter));
        KernelChoices {
            of_operation: Arc::new(found.cloned().unwrap_or_default()),
            behind: String::new(),
        }
    }

    /// Adds choices for an adapter to those that are there, in place of what is there for the same operations.
    pub fn insert(&mut self, adapter: &AdapterSummary, choices: &KernelChoices) {
        let entry = self.adapters.entry(Self::adapter_key(adapter)).or_default();
        for (operation, kernel) in choices.iter() {
            entry.insert(operation.to_owned(), kernel.to_owned());
        }
    }

    /// The adapters that have choices.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Reads the contents of such a file; `path` is for errors alone.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not one, or of a later version.
    pub fn from_json(json: &str, path: impl AsRef<Path>) -> Result<Self> {
        let wrong = |reason: String| Error::Format {
            path: path.as_ref().to_owned(),
            reason,
        };
        let tuned: Self = serde_json::from_str(json).map_err(|error| wrong(error.to_string()))?;
        if tuned.format != FORMAT {
            return Err(wrong(format!(
                "format is {:?}, expected {FORMAT:?}",
                tuned.format
            )));
        }
        if tuned.version != VERSION {
            return Err(wrong(format!(
                "version is {}, this release reads {VERSION}",
                tuned.version
            )));
        }
        Ok(tuned)
    }

    /// The contents of such a file.
    #[must_use]
    pub fn to_json(&self) -> String {
        let value = serde_json::json!({
            "format": self.format,
            "version": self.version,
            "adapters": self.adapters,
        });
        format!("{value:#}\n")
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, and as [`TunedKernels::from_json`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = file::read_text(path)?;
        Self::from_json(&json, path)
    }

    /// Writes the file under a temporary name beside it and renames it, so that the old file is there until the new one is whole.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::replace(path.as_ref(), self.to_json().as_bytes())
    }
}
