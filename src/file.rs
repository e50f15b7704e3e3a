//! Writing files so that a reader finds the old one or the whole new one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// What a failure of the system at a file becomes.
pub(crate) fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
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
    write: impl FnOnce(&mut fs::File) -> io::Result<()>,
) -> Result<()> {
    replace_with(path, |_, mut file| {
        write(&mut file)?;
        Ok(file)
    })
}

/// The same, the file written by a function that is given the temporary name, under which there is an empty file.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub(crate) fn replace_at(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    replace_with(path, |temporary, empty| {
        close(empty);
        write(temporary)?;
        // It may be another file now.
        fs::OpenOptions::new().write(true).open(temporary)
    })
}

/// The function is given the temporary name and the empty file there, and returns what is there when it has written.
fn replace_with(
    path: &Path,
    write: impl FnOnce(&Path, fs::File) -> io::Result<fs::File>,
) -> Result<()> {
    let (temporary, empty) = new_beside(path).map_err(failed(path))?;
    let written = write(&temporary, empty).and_then(|file| {
        // The name must not be there before the contents are.
        file.sync_all()?;
        close(file);
        fs::rename(&temporary, path)?;
        sync_folder(folder_of(path))
    });
    written.map_err(|source| {
        // What is left of a failed attempt is of no use to anyone; that it cannot be removed either changes nothing.
        _ = fs::remove_file(&temporary);
        failed(path)(source)
    })
}

/// Closes a file by letting it go; a browser's, which has none, is nothing that could be dropped.
fn close(_file: fs::File) {}

static CALLS: AtomicU64 = AtomicU64::new(0);

/// Makes a file with a name that nothing had, neither a file that a process of the same number has left nor a link to another one.
fn new_beside(path: &Path) -> io::Result<(PathBuf, fs::File)> {
    loop {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}-{call}.partial", process_id()));
        let temporary = PathBuf::from(temporary);
        let mut options = fs::OpenOptions::new();
        match options.write(true).create_new(true).open(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return Ok((temporary, made?)),
        }
    }
}

/// The folder that something is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Waits until what was renamed in a folder stays renamed after a power cut.
///
/// # Errors
/// The system's.
#[cfg(unix)]
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    match synced {
        // File systems that know no such thing for folders, and folders that may be written to and not read.
        Err(error) if [InvalidInput, Unsupported, PermissionDenied].contains(&error.kind()) => {
            Ok(())
        }
        other => other,
    }
}

/// Folders cannot be opened here.
#[cfg(not(unix))]
pub(crate) fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// A browser has neither processes nor files.
fn process_id() -> u32 {
    if cfg!(target_arch = "wasm32") {
        0
    } else {
        std::process::id()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::Ordering;

    use super::{CALLS, process_id, replace, replace_at, sync_folder};

    #[test]
    fn a_name_that_is_taken_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let at = |name: &str| folder.path().join(name);
        fs::write(at("victim"), "mine").expect("a file");
        let next = CALLS.load(Ordering::Relaxed);
        let taken = |call: u64| at(&format!("new.{}-{call}.partial", process_id()));
        for call in next..next + 60 {
            if call % 2 == 0 {
                symlink(at("victim"), taken(call)).expect("a link");
            } else {
                fs::write(taken(call), "of a dead process").expect("a file");
            }
        }
        replace(&at("new"), b"whole").expect("a folder of its own");
        assert_eq!(fs::read(at("new")).expect("the file"), b"whole");
        replace_at(&at("new"), |temporary| fs::write(temporary, "again"))
            .expect("a folder of its own");
        assert_eq!(fs::read(at("new")).expect("the file"), b"again");
        assert!(
            !fs::symlink_metadata(at("new"))
                .expect("the file")
                .is_symlink()
        );
        assert_eq!(fs::read(at("victim")).expect("the file"), b"mine");
        for call in next..next + 60 {
            assert!(fs::symlink_metadata(taken(call)).is_ok(), "{call} is gone");
        }
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 62);
    }

    #[test]
    fn a_failed_attempt_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let path = folder.path().join("new");
        let failed = replace_at(&path, |_| Err(std::io::Error::other("no")));
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        sync_folder(folder.path()).expect("a folder");
        sync_folder(&path).expect_err("there is none");
    }
}
