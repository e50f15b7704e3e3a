//! A folder that is there whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rankmix::{Error, Result};
use serde::Serialize;

/// The report beside what was made.
pub(crate) const REPORT: &str = "conversion.json";

/// What a folder may hold that is to be replaced: a user who names another one by mistake loses nothing.
const OURS: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", REPORT];

/// A folder that is being written under a temporary name beside its own.
pub(crate) struct OutputFolder {
    path: PathBuf,
    temporary: PathBuf,
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File {
        path: path.to_owned(),
        source,
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    failed(path, io::Error::new(io::ErrorKind::AlreadyExists, reason))
}

/// `PATH.PROCESS.WHAT`, beside the path.
fn beside(path: &Path, what: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.{what}", std::process::id()));
    name.into()
}

impl OutputFolder {
    /// Makes the temporary folder.
    ///
    /// # Errors
    /// [`Error::File`] if the path is taken and may not be replaced, is one of the inputs, or nothing can be made beside it.
    pub(crate) fn new(path: &Path, overwrite: bool, inputs: &[&Path]) -> Result<Self> {
        // Without a slash at the end, so that a name can be put behind it.
        let path: PathBuf = path.components().collect();
        if path.exists() {
            if !overwrite {
                return Err(refused(&path, "is there already; --overwrite replaces it"));
            }
            let real = |path: &Path| path.canonicalize().ok();
            if inputs.iter().any(|input| real(input) == real(&path)) {
                return Err(refused(&path, "is an input; it cannot be the output too"));
            }
            for entry in fs::read_dir(&path).map_err(|error| failed(&path, error))? {
                let entry = entry.map_err(|error| failed(&path, error))?;
                if !OURS.iter().any(|name| entry.file_name() == *name) {
                    return Err(refused(
                        &entry.path(),
                        "was not made by this command: its folder is not replaced",
                    ));
                }
            }
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        }
        let temporary = beside(&path, "partial");
        fs::create_dir(&temporary).map_err(|error| failed(&temporary, error))?;
        Ok(Self { path, temporary })
    }

    /// Where to write.
    pub(crate) fn place(&self) -> &Path {
        &self.temporary
    }

    /// Writes the report.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub(crate) fn report(&self, report: &impl Serialize) -> Result<()> {
        let path = self.temporary.join(REPORT);
        let mut text = serde_json::to_string_pretty(report)
            .map_err(|error| failed(&path, io::Error::other(error)))?;
        text.push('\n');
        File::create(&path)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .map_err(|error| failed(&path, error))
    }

    /// Gives the folder its name. One that was there is moved away first and removed last, so that at any moment the old one or the new one
    /// is whole on the disk.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be renamed; what was there before is put back.
    pub(crate) fn finish(self) -> Result<()> {
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| failed(to, e));
        if !self.path.exists() {
            return rename(&self.temporary, &self.path);
        }
        let old = beside(&self.path, "old");
        rename(&self.path, &old)?;
        if let Err(error) = rename(&self.temporary, &self.path) {
            rename(&old, &self.path)?;
            return Err(error);
        }
        fs::remove_dir_all(&old).map_err(|error| failed(&old, error))
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        // Of a finished one nothing is left; of a failed one nothing is of use.
        _ = fs::remove_dir_all(&self.temporary);
    }
}
