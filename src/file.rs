//! Writing files so that a reader finds the old one or the whole new one.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// What a failure of the system at a file becomes.
pub(crate) fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File {
        path: path.to_owned(),
        source,
    }
}

/// What becomes of a reason why a file is damaged.
pub(crate) fn damaged(path: &Path) -> impl FnOnce(String) -> Error {
    move |reason| Error::Format {
        path: path.to_owned(),
        reason,
    }
}

/// What a file of JSON holds.
///
/// # Errors
/// [`Error::File`] if it cannot be read, [`Error::Format`] if it holds something else.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| damaged(path)(error.to_string()))
}

/// The whole of a text file.
///
/// # Errors
/// [`Error::File`] if it cannot be read.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(failed(path))
}

/// Writes a file under a temporary name beside it, which is this call's own, and renames it. Of several at once, the last one's stays.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub(crate) fn replace(path: &Path, contents: &[u8]) -> Result<()> {
    replace_by(path, |file| file.write_all(contents))
}

/// The same, the contents written by a function.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub(crate) fn replace_by(
    path: &Path,
    write: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<()> {
    replace_at(path, |temporary| write(&mut fs::File::create(temporary)?))
}

/// The same, the file written by a function that is given the temporary name.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub(crate) fn replace_at(
    path: &Path,
    write: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<()> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}-{call}.partial", process_id()));
    let temporary = Path::new(&temporary);
    let written = write(temporary).and_then(|()| {
        // The name must not be there before the contents are.
        fs::OpenOptions::new()
            .write(true)
            .open(temporary)?
            .sync_all()?;
        fs::rename(temporary, path)
    });
    written.map_err(|source| {
        // What is left of a failed attempt is of no use to anyone; that it cannot be removed either changes nothing.
        _ = fs::remove_file(temporary);
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
