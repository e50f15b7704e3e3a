//! What the source of a conversion is, and what of it is copied.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::{Value, json};

use crate::error::Result;
use crate::file::{self, failed as at, folder_of};
use crate::formats::Checkpoint;

/// Weights in other formats, which would still be those of the source.
const OTHER_WEIGHTS: [&str; 9] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "gguf",
    "h5",
    "msgpack",
    "onnx",
    "ot",
];

/// A file's name in the folder `root`, however its path is spelled. Links count by their own names where what they lead to is elsewhere, as in caches of
/// models; what lies elsewhere itself has its whole path.
fn name_in(root: &Path, path: &Path) -> Result<String> {
    let whole = path.canonicalize().map_err(at(path))?;
    let folder = folder_of(path).canonicalize().map_err(at(path))?;
    let link = folder.join(path.file_name().unwrap_or_default());
    let inside = [&whole, &link].map(|path| path.strip_prefix(root).ok());
    let [whole_inside, link_inside] = inside;
    let name = whole_inside.or(link_inside).unwrap_or(&whole);
    Ok(name.to_string_lossy().into_owned())
}

/// A file's name, size and time of its last change.
pub(crate) fn facts(root: &Path, path: &Path) -> Result<Value> {
    let metadata = fs::metadata(path).map_err(at(path))?;
    // Some file systems keep no times; size and headers are left then.
    let modified = metadata.modified().ok();
    let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(json!({
        "name": name_in(root, path)?,
        "bytes": metadata.len(),
        "modified": since.map(|since| format!("{}.{:09}", since.as_secs(), since.subsec_nanos())),
    }))
}

/// What a model is told by: where it is, its files with their sizes and times, `others` among them, and a checksum of what tensors there are.
pub(crate) fn identity(checkpoint: &Checkpoint, others: &[PathBuf]) -> Result<Value> {
    let folder = checkpoint.files().next().map_or(Path::new("."), folder_of);
    identity_at(folder, checkpoint, others)
}

/// The same of what was opened as `path`: a folder, one of its files, or an index. It is equal for every spelling of the path.
pub(crate) fn identity_at(
    path: &Path,
    checkpoint: &Checkpoint,
    others: &[PathBuf],
) -> Result<Value> {
    let path = path.canonicalize().map_err(at(path))?;
    let root = if path.is_dir() {
        &path
    } else {
        folder_of(&path)
    };
    let mut headers = crc32fast::Hasher::new();
    for (name, entry) in checkpoint.tensors() {
        headers.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
    }
    let files = checkpoint.files().map(Path::to_owned);
    let files = files
        .chain(others.iter().cloned())
        .map(|file| facts(root, &file))
        .collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "path": root.to_string_lossy(),
        "files": files,
        "headers_crc32": headers.finalize(),
    }))
}

/// Whether a file holds weights or says where they are.
fn is_of_weights(name: &str) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    OTHER_WEIGHTS.iter().any(|other| extension == *other)
        || name.ends_with(".safetensors.index.json")
        || name.ends_with(".bin.index.json")
}

/// Copies what a model's folder holds beside its weights, folders in it too, except what `written` names; hidden files and folders are left, and links are
/// followed to files only: a link to a folder may lead back to where it is, or to a whole disk. Returns what was not copied: the weights in other
/// files, for they are of the model as it was, and those links and what else is no file, with the reason behind the name.
pub(crate) fn copy_others(
    from: &Path,
    to: &Path,
    checkpoint: &Checkpoint,
    written: &[&str],
) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let mut entries = fs::read_dir(from)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(at(from))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let text = name.to_string_lossy();
        if text.starts_with('.') || written.contains(&&*text) {
            continue;
        }
        let target = to.join(&name);
        let own_kind = entry.file_type().map_err(at(&path))?;
        if own_kind.is_dir() {
            fs::create_dir_all(&target).map_err(at(&target))?;
            let inner = copy_others(&path, &target, checkpoint, &[])?;
            left.extend(inner.into_iter().map(|inner| format!("{text}/{inner}")));
            continue;
        }
        if is_of_weights(&text) {
            let of_model = checkpoint.files().any(|file| file == path)
                || text == "model.safetensors.index.json";
            if !of_model {
                left.push(text.into_owned());
            }
            continue;
        }
        match fs::metadata(&path) {
            Ok(kind) if kind.is_file() => {}
            Ok(kind) if kind.is_dir() => {
                left.push(format!("{text} (a link to a folder)"));
                continue;
            }
            // Reading from a pipe would wait for whoever writes to it.
            Ok(_) => {
                left.push(format!("{text} (no file)"));
                continue;
            }
            Err(error) if own_kind.is_symlink() && error.kind() == io::ErrorKind::NotFound => {
                left.push(format!("{text} (a link to nothing)"));
                continue;
            }
            Err(error) => return Err(at(&path)(error)),
        }
        let mut source = fs::File::open(&path).map_err(at(&path))?;
        file::replace_by(&target, |file| io::copy(&mut source, file).map(|_| ()))?;
    }
    Ok(left)
}
