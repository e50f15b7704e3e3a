//! Writing files so that a reader finds the old one or the whole new one.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file under a temporary name beside it, which is this process's own, and renames it.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub(crate) fn replace(path: &Path, contents: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.partial", process_id()));
    let written = fs::File::create(&temporary).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.map_err(|source| {
        // What is left of a failed attempt is of no use to anyone; that it cannot be removed either changes nothing.
        _ = fs::remove_file(&temporary);
        Error::File {
            path: path.to_owned(),
            source,
        }
    })
}

/// A browser has neither processes nor files.
fn process_id() -> u32 {
    if cfg!(target_arch = "wasm32") {
        0
    } else {
        std::process::id()
    }
}
