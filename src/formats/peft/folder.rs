//! An adapter's folder: a configuration, and the tensors that it is for.
//!
//! Two files cannot be replaced in one step, and new tensors under an old configuration can have all the right shapes and another alpha. So the
//! old configuration is taken away first and the new one is put there last: a folder whose writing was cut short has none, which no reader takes,
//! PEFT neither.

use std::collections::HashMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::Result;
use crate::file;
use crate::formats::checkpoint::{self, ADAPTER, Checkpoint, RawTensor};

/// The configuration's name.
pub(crate) const CONFIG: &str = "adapter_config.json";

/// What a folder with the new files is called until they are in their places; a number follows.
const STAGED: &str = "adapter.writing-";

/// The old configuration, while it is in the folder of the new files.
const PREVIOUS: &str = "previous_adapter_config.json";

/// An adapter's folder, as far as it is read before the kind of adapter is asked for.
#[derive(Debug)]
pub(crate) struct Opened<C> {
    /// Where the configuration is, for messages.
    pub(crate) path: PathBuf,
    /// The configuration.
    pub(crate) config: C,
    /// The tensors.
    pub(crate) tensors: Checkpoint,
}

/// Opens an adapter's folder; `config` makes the configuration of the file's object, or says what is wrong with it.
///
/// # Errors
/// [`Error::File`](crate::Error::File) if a file cannot be read; [`Error::Format`](crate::Error::Format) if one is damaged, the tensors are a pickle, the configuration is missing beside
/// tensors, or was replaced while they were opened.
pub(crate) fn open<C>(
    folder: &Path,
    config: impl FnOnce(Map<String, Value>) -> Result<C, String>,
) -> Result<Opened<C>> {
    let path = folder.join(CONFIG);
    let held = open_config(folder, &path)?;
    let text = io::read_to_string(&held).map_err(file::failed(&path))?;
    let object = serde_json::from_str(&text).map_err(|error| error.to_string());
    let config = object.and_then(config).map_err(file::damaged(&path))?;
    let tensors = open_tensors(folder)?;
    // Tensors of a writer that came in between would be under a configuration that is not theirs. It has taken that one away by then.
    let now = open_config(folder, &path)?;
    if !is_same(&held, &text, &now).map_err(file::failed(&path))? {
        let reason = "was replaced while the tensors were opened: read the adapter again";
        return Err(file::damaged(&path)(reason.to_owned()));
    }
    Ok(Opened {
        path,
        config,
        tensors,
    })
}

fn open_config(folder: &Path, path: &Path) -> Result<fs::File> {
    match fs::File::open(path) {
        Err(error)
            if error.kind() == ErrorKind::NotFound
                && (folder.join(ADAPTER).exists() || !staged(folder).is_empty()) =>
        {
            let mut reason = "is missing: it was not copied, or writing the adapter was cut short; write or copy it again".to_owned();
            match staged(folder).as_slice() {
                [] => {}
                [staged] => {
                    reason += &format!(
                        ". {staged} has what a writer had not put into place yet, if none has written here since"
                    );
                    if folder.join(staged).join(PREVIOUS).exists() {
                        reason += &format!(", and the configuration from before as {PREVIOUS}");
                    }
                }
                several => {
                    reason += &format!(
                        ". Several writers were cut short ({}): which tensors are in place cannot be told from outside, so write the adapter again and remove these",
                        several.join(", ")
                    );
                }
            }
            Err(file::damaged(path)(reason))
        }
        opened => opened.map_err(file::failed(path)),
    }
}

/// Whether the configuration is still the file that was read. That one is held open, so that no other has its number.
#[cfg(unix)]
fn is_same(held: &fs::File, _: &str, now: &fs::File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let [held, now] = [held.metadata()?, now.metadata()?];
    Ok((held.dev(), held.ino()) == (now.dev(), now.ino()))
}

/// Whether the configuration still says the same.
#[cfg(not(unix))]
fn is_same(_: &fs::File, text: &str, now: &fs::File) -> io::Result<bool> {
    Ok(io::read_to_string(now)? == text)
}

/// The names of folders that writers have left.
fn staged(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(STAGED)).collect();
    names.sort();
    names
}

/// Opens the tensors of an adapter's folder.
///
/// # Errors
/// [`Error::File`](crate::Error::File) if they are not there, [`Error::Format`](crate::Error::Format) if they are damaged or a pickle.
fn open_tensors(folder: &Path) -> Result<Checkpoint> {
    let path = folder.join(ADAPTER);
    let pickle = folder.join("adapter_model.bin");
    if !path.exists() && pickle.exists() {
        let reason = "a pickle, which can run any code: save the adapter as safetensors";
        return Err(file::damaged(&pickle)(reason.to_owned()));
    }
    Checkpoint::open(path)
}

/// Writes an adapter's folder, which is made if it is not there: both files whole in a folder of their own inside of it, and then three renames. Files
/// of other names are left alone.
///
/// # Errors
/// [`Error::File`](crate::Error::File) if it cannot be written: then what was there before is there still, unless the configuration alone could not be put
/// into place, and is missing.
pub(crate) fn write(
    folder: &Path,
    tensors: &[RawTensor<'_>],
    metadata: HashMap<String, String>,
    config: &str,
) -> Result<()> {
    fs::create_dir_all(folder).map_err(file::failed(folder))?;
    let staged = stage(folder)?;
    let written = checkpoint::write(&staged.join(ADAPTER), tensors, metadata)
        .and_then(|()| file::replace(&staged.join(CONFIG), config.as_bytes()))
        .and_then(|()| exchange(folder, &staged));
    // Where new tensors are in place and their configuration is not, or an old one is out of its place, that is not to be lost.
    let has = |name: &str| staged.join(name).exists();
    let is_between = has(PREVIOUS) || has(CONFIG) && !has(ADAPTER);
    if written.is_ok() || folder.join(CONFIG).exists() || !is_between {
        // Nobody needs what is left. File by file: nothing goes with it that is not known here.
        for name in [ADAPTER, CONFIG, PREVIOUS] {
            _ = fs::remove_file(staged.join(name));
        }
        _ = fs::remove_dir(&staged);
    }
    written
}

/// Makes the folder for the new files.
fn stage(folder: &Path) -> Result<PathBuf> {
    let mut number = 0_u64;
    loop {
        let staged = folder.join(format!("{STAGED}{number}"));
        match fs::create_dir(&staged) {
            Ok(()) => return Ok(staged),
            // Of another writer, or left by one that was cut short.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(source) => return Err(file::failed(&staged)(source)),
        }
    }
}

/// The old configuration out, the tensors in, the configuration in: after a loss of power, no later rename is on the disk without the earlier ones.
fn exchange(folder: &Path, staged: &Path) -> Result<()> {
    let [config, tensors] = [CONFIG, ADAPTER].map(|name| folder.join(name));
    let previous = staged.join(PREVIOUS);
    match fs::rename(&config, &previous) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(file::failed(&config)(error));
        }
        _ => {}
    }
    let moved = file::sync_folder(folder).and_then(|()| fs::rename(staged.join(ADAPTER), &tensors));
    if let Err(source) = moved {
        // The old tensors are there: with the old configuration nothing has happened.
        _ = fs::rename(&previous, &config);
        return Err(file::failed(&tensors)(source));
    }
    file::sync_folder(folder).map_err(file::failed(folder))?;
    fs::rename(staged.join(CONFIG), &config)
        .and_then(|()| file::sync_folder(folder))
        .map_err(file::failed(&config))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use super::{open, write};
    use crate::error::Error;

    fn written(folder: &Path, config: &str) {
        write(folder, &[], HashMap::new(), config).expect("a folder of its own");
    }

    /// A writer comes between the configuration and the tensors: those are not given out under another one's configuration.
    #[test]
    fn a_configuration_that_is_replaced_while_it_is_read_is_refused() {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let folder = folder.path();
        let (one, other) = (r#"{"r": 1}"#, r#"{"r": 2}"#);
        written(folder, one);
        // Twice: in the end there is the text that was read, and other tensors may have been there.
        let writers: &[&[&str]] = if cfg!(unix) {
            &[&[other], &[other, one], &[one]]
        } else {
            &[&[other]]
        };
        for configs in writers {
            written(folder, one);
            let opened = open(folder, |_| {
                configs.iter().for_each(|config| written(folder, config));
                Ok(())
            });
            let found = matches!(&opened, Err(Error::Format { reason, .. }) if reason.contains("was replaced"));
            assert!(found, "{configs:?}: {opened:?}");
        }
        written(folder, one);
        let opened = open(folder, |object| Ok(object["r"].clone())).expect("nobody writes");
        assert_eq!(opened.config, 1);
    }
}
