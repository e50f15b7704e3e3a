//! A folder that is made beside its final name and takes it when it is whole.
//!
//! `OUT.partial` holds what is done so far and [`REPORT`], which says of what conversion; a run after one that was ended goes on in it. The end is one
//! rename, or, over an old folder, one exchange of two names, so that whoever opens `OUT` finds the old folder or the whole new one.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Value, json};

pub(crate) use crate::convert::fingerprint::Fingerprint;
use crate::convert::fingerprint::differences;
use crate::error::{Error, Result};
use crate::file::{self, failed as at};
use crate::formats::write_json;

/// The report of a conversion; while it goes on, what it is a conversion of.
pub(crate) const REPORT: &str = "conversion.json";
/// What is behind the name of everything that is not whole yet.
const PARTIAL: &str = ".partial";
/// What is behind the name of an old output between two renames.
const PREVIOUS: &str = ".previous";

/// What may be done with what is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replacement {
    /// An output that is there is replaced.
    pub(crate) overwrite: bool,
    /// What another run has left unfinished is thrown away.
    pub(crate) restart: bool,
}

/// A value as JSON; the path is for the message.
pub(crate) fn json_of(path: impl AsRef<Path>, value: &impl Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| file::damaged(path.as_ref())(error.to_string()))
}

/// The folder in the making.
#[derive(Debug)]
pub(crate) struct Stage {
    out: PathBuf,
    partial: PathBuf,
    overwrite: bool,
    /// What was found of an earlier run, in words.
    pub(crate) notice: Option<String>,
    /// Whether an earlier run of the same conversion has left something.
    goes_on: bool,
    /// Held as long as the folder is written to.
    _lock: Option<Lock>,
}

pub(crate) fn refused(path: &Path, reason: impl Into<String>) -> Error {
    at(path)(io::Error::new(io::ErrorKind::AlreadyExists, reason.into()))
}

/// `path` with something behind its name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// The names in a folder, in order.
pub(crate) fn names(folder: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>().map_err(at(folder))?;
    names.sort();
    Ok(names)
}

/// Whether a name is one of those that files have before they are whole: ours, `NAME.PROCESS-CALL.partial`, or those of the safetensors crate, `.tmp` and
/// six characters.
fn is_leftover(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let random = name.strip_prefix(".tmp");
    if random.is_some_and(|random| {
        random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
    }) {
        return true;
    }
    let call = name
        .strip_suffix(PARTIAL)
        .and_then(|name| name.rsplit_once('.'))
        .and_then(|(_, call)| call.split_once('-'));
    call.is_some_and(|(process, call)| {
        [process, call]
            .iter()
            .all(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Whether a conversion has made this folder, or nobody has put anything into it.
fn is_ours(folder: &Path) -> Result<bool> {
    Ok(folder.join(REPORT).is_file() || names(folder)?.iter().all(|name| is_leftover(name)))
}

/// Removes what is in a folder of a conversion, its report last: until then it can be told whose it is.
fn clear(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if name == REPORT {
            continue;
        }
        let kind = fs::symlink_metadata(&path).map_err(at(&path))?;
        if kind.is_dir() {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        } else {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    clear(folder)?;
    fs::remove_dir_all(folder).map_err(at(folder))
}

/// A path without `..` and links, of something that need not be there yet.
fn resolved(path: &Path) -> Result<PathBuf> {
    if let Ok(resolved) = path.canonicalize() {
        return Ok(resolved);
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path
        .file_name()
        .ok_or_else(|| refused(path, "this is no name of a folder that could be made"))?;
    Ok(resolved(parent)?.join(name))
}

impl Stage {
    /// Begins a folder, or goes on with what another run has left of the same one. `sources` are the files and folders that are read.
    ///
    /// # Errors
    /// [`Error::File`] if the output is there and may not be replaced, or is none of ours; if it lies in a source or a source in it; if
    /// another process is at it; if what another run has left is of other options or of another source.
    pub(crate) fn open(
        out: &Path,
        sources: &[&Path],
        fingerprint: &Fingerprint,
        replacement: Replacement,
    ) -> Result<Self> {
        let remedy = "or ask for a new start (`restart`), which throws it away";
        Self::open_or(remedy, out, sources, fingerprint, replacement)
    }

    /// The same for a conversion that cannot be asked for a new start.
    ///
    /// # Errors
    /// As [`Stage::open`].
    pub(crate) fn open_without_restart(
        out: &Path,
        sources: &[&Path],
        fingerprint: &Fingerprint,
        overwrite: bool,
    ) -> Result<Self> {
        let replacement = Replacement {
            overwrite,
            restart: false,
        };
        let remedy = "or remove this folder";
        Self::open_or(remedy, out, sources, fingerprint, replacement)
    }

    fn open_or(
        remedy: &str,
        out: &Path,
        sources: &[&Path],
        fingerprint: &Fingerprint,
        replacement: Replacement,
    ) -> Result<Self> {
        let out = apart(out, sources)?;
        let partial = beside(&out, PARTIAL);
        let previous = beside(&out, PREVIOUS);
        // A run was ended between the two renames of `publish`: nothing else leaves a whole folder under the partial name and none under the output's.
        if !out.exists() && is_finished(&partial) && previous.join(REPORT).is_file() {
            rename(&previous, &out)?;
        }
        check_replaceable(&out, replacement.overwrite)?;
        let mut stage = Self {
            out,
            partial,
            overwrite: replacement.overwrite,
            notice: None,
            goes_on: false,
            _lock: None,
        };
        stage.begin(remedy, fingerprint, replacement.restart)?;
        Ok(stage)
    }

    fn begin(&mut self, remedy: &str, fingerprint: &Fingerprint, restart: bool) -> Result<()> {
        let partial = self.partial.clone();
        let is_new = !partial.exists();
        if is_new {
            fs::create_dir_all(&partial).map_err(at(&partial))?;
            file::sync_folder(file::folder_of(&partial)).map_err(at(&partial))?;
        }
        self._lock = locked(&partial)?;
        if !is_new {
            if !is_ours(&partial)? {
                return Err(refused(&partial, not_ours()));
            }
            let other = match found(&self.out, &partial, fingerprint) {
                Found::Same => {
                    self.goes_on = true;
                    self.notice = Some(format!("going on in {}", partial.display()));
                    return remove_leftovers(&partial);
                }
                Found::Finished | Found::Nothing => None,
                Found::OtherOptions(differences) => {
                    Some(format!("with other options ({differences})"))
                }
                Found::OtherSource(differences) => {
                    Some(format!("of another source ({differences})"))
                }
                Found::Unreadable(error) => Some(format!("whose report cannot be read ({error})")),
            };
            if let Some(other) = other {
                if !restart {
                    return Err(refused(
                        &partial,
                        format!(
                            "an unfinished conversion {other}: finish that one as it was begun, {remedy}"
                        ),
                    ));
                }
                self.notice = Some(format!(
                    "starting anew, what was there is thrown away: an unfinished conversion {other}"
                ));
            }
            clear(&partial)?;
        }
        write_json(
            &partial.join(REPORT),
            &json!({
                "unfinished": true,
                "options": fingerprint.options,
                "source": fingerprint.source,
            }),
        )
    }

    /// Removes what another run has left in it: for what is made anew.
    ///
    /// # Errors
    /// [`Error::File`] if that cannot be done.
    pub(crate) fn empty(&mut self) -> Result<()> {
        if self.goes_on {
            self.notice = Some(format!("making {} anew", self.partial.display()));
        }
        clear(&self.partial)
    }

    /// The folder to write to.
    pub(crate) fn folder(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name, with a report that says of what conversion it is: the keys of `report`, and `conversion`, `options` and `source`.
    ///
    /// # Errors
    /// As [`Stage::publish`].
    pub(crate) fn publish_with(
        self,
        conversion: &str,
        fingerprint: &Fingerprint,
        report: &impl Serialize,
    ) -> Result<()> {
        let mut document = json!({
            "conversion": conversion,
            "options": fingerprint.options,
            "source": fingerprint.source,
        });
        if let (Some(document), Value::Object(report)) =
            (document.as_object_mut(), json_of(REPORT, report)?)
        {
            document.extend(report);
        }
        self.publish(&document)
    }

    /// Gives the folder its name, with this report in it. Where there was an old one, it is removed afterwards.
    ///
    /// # Errors
    /// [`Error::File`] if that cannot be done.
    pub(crate) fn publish(self, report: &Value) -> Result<()> {
        sync_folders(&self.partial)?;
        write_json(&self.partial.join(REPORT), report)?;
        if !self.out.exists() {
            return rename(&self.partial, &self.out);
        }
        // It may have come while this run was at work.
        check_replaceable(&self.out, self.overwrite)?;
        // Held while the old folder is removed under the partial name, which a run that begins now would take.
        let _old = locked(&self.out)?;
        if exchanged(&self.partial, &self.out) {
            // Before the old one is touched, or a power cut could leave half of it under the output's name.
            file::sync_folder(file::folder_of(&self.out)).map_err(at(&self.out))?;
            return remove(&self.partial);
        }
        let previous = beside(&self.out, PREVIOUS);
        if previous.exists() {
            if !is_ours(&previous)? {
                return Err(refused(&previous, not_ours()));
            }
            remove(&previous)?;
        }
        rename(&self.out, &previous)?;
        rename(&self.partial, &self.out)?;
        remove(&previous)
    }
}

/// Renames a folder, so that it stays renamed after a power cut.
fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .and_then(|()| file::sync_folder(file::folder_of(to)))
        .map_err(at(to))
}

/// Names that were made in a folder, and in the folders in it, are there after a power cut.
fn sync_folders(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(name);
        if fs::symlink_metadata(&path).map_err(at(&path))?.is_dir() {
            sync_folders(&path)?;
        }
    }
    file::sync_folder(folder).map_err(at(folder))
}

fn not_ours() -> String {
    format!("there is no {REPORT} in it: what no conversion has made is not replaced")
}

/// The report in a folder; null if there is none that can be read.
fn report_in(folder: &Path) -> Value {
    file::read_json(&folder.join(REPORT)).unwrap_or_default()
}

/// Whether a folder holds the report of a conversion that came to its end.
fn is_finished(folder: &Path) -> bool {
    let report = report_in(folder);
    report.is_object() && report.get("unfinished").is_none()
}

/// The output's path, which lies in none of the sources, and none of them in it or in what is beside it for a while.
fn apart(out: &Path, sources: &[&Path]) -> Result<PathBuf> {
    let out = resolved(out)?;
    for source in sources {
        let source = source.canonicalize().map_err(at(source))?;
        let taken = [out.clone(), beside(&out, PARTIAL), beside(&out, PREVIOUS)];
        for taken in taken {
            if taken.starts_with(&source) || source.starts_with(&taken) {
                return Err(refused(&taken, "the output and an input lie in each other"));
            }
        }
    }
    Ok(out)
}

/// Checks what [`Stage::open`] does before it makes anything.
pub(crate) fn check(out: &Path, sources: &[&Path], overwrite: bool) -> Result<()> {
    check_replaceable(&apart(out, sources)?, overwrite)
}

/// Checks that nothing is at the output's name, or what may be replaced.
fn check_replaceable(out: &Path, overwrite: bool) -> Result<()> {
    if !out.exists() {
        if fs::symlink_metadata(out).is_ok() {
            return Err(refused(out, "this is a link to what is not there"));
        }
        return Ok(());
    }
    if !overwrite {
        return Err(refused(
            out,
            "the output is there already, and replaced only if that is asked for (`overwrite`)",
        ));
    }
    if !out.is_dir() {
        return Err(refused(out, "this is no folder"));
    }
    if !is_ours(out)? {
        return Err(refused(out, not_ours()));
    }
    Ok(())
}

/// What another run has left.
enum Found {
    Nothing,
    Same,
    OtherOptions(String),
    OtherSource(String),
    /// It cannot be told what it is of.
    Unreadable(Error),
    /// An old output whose place the new one has taken already.
    Finished,
}

fn found(out: &Path, partial: &Path, fingerprint: &Fingerprint) -> Found {
    let path = partial.join(REPORT);
    if !path.exists() {
        return Found::Nothing;
    }
    let report: Value = match file::read_json(&path) {
        Ok(report) => report,
        Err(error) => return Found::Unreadable(error),
    };
    let Some(other) = Fingerprint::of(&report) else {
        return Found::Finished;
    };
    // Under the partial name a whole folder is the old output after an exchange, or the new one before it, or before its only rename.
    let is_whole = report.get("unfinished").is_none();
    let is_of_out = || Fingerprint::of(&report_in(out)).as_ref() == Some(fingerprint);
    if is_whole && out.exists() {
        let is_old = other != *fingerprint && !is_newer(&path, &out.join(REPORT));
        if is_old || other == *fingerprint && is_of_out() {
            return Found::Finished;
        }
    }
    if other == *fingerprint {
        Found::Same
    } else if other.options == fingerprint.options {
        Found::OtherSource(differences(&other.source, &fingerprint.source))
    } else {
        Found::OtherOptions(differences(&other.options, &fingerprint.options))
    }
}

/// Whether a file was changed after another one.
fn is_newer(one: &Path, other: &Path) -> bool {
    let [one, other] = [one, other].map(|path| {
        let time = fs::metadata(path).and_then(|metadata| metadata.modified());
        time.unwrap_or(SystemTime::UNIX_EPOCH)
    });
    one > other
}

/// Removes what a process that was ended has left half written, in the folders inside too.
fn remove_leftovers(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if path.is_dir() {
            remove_leftovers(&path)?;
        } else if is_leftover(&name) {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// A lock on a folder, given back when it is dropped. Closing alone would leave it to whoever has a copy of the handle, as a process has that
/// another thread has just forked.
#[cfg(unix)]
#[derive(Debug)]
struct Lock(fs::File);

#[cfg(unix)]
impl Drop for Lock {
    fn drop(&mut self) {
        // It ends with the last copy at the latest.
        _ = self.0.unlock();
    }
}

#[cfg(not(unix))]
#[derive(Debug)]
enum Lock {}

/// Two conversions at once in one folder would remove each other's files. The lock ends with the process, whatever ends it.
#[cfg(unix)]
fn locked(folder: &Path) -> Result<Option<Lock>> {
    let handle = fs::File::open(folder).map_err(at(folder))?;
    let is_locked = is_held(folder, handle.try_lock())?;
    Ok(is_locked.then_some(Lock(handle)))
}

/// Whether a lock is held after it was tried for; not on a file system that has none.
#[cfg(unix)]
fn is_held(folder: &Path, tried: std::result::Result<(), fs::TryLockError>) -> Result<bool> {
    match tried {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => {
            Err(refused(folder, "another process is writing to it"))
        }
        Err(fs::TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
            Ok(false)
        }
        Err(fs::TryLockError::Error(error)) => Err(at(folder)(error)),
    }
}

/// Folders cannot be opened here.
#[cfg(not(unix))]
fn locked(_folder: &Path) -> Result<Option<Lock>> {
    Ok(None)
}

/// Whether the two have exchanged their names, which not every system and file system can do in one step.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn exchanged(one: &Path, other: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn exchanged(_one: &Path, _other: &Path) -> bool {
    false
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs::TryLockError;
    use std::io::{Error, ErrorKind};
    use std::path::Path;

    use super::{is_held, locked};

    #[test]
    fn only_a_file_system_without_locks_goes_without() {
        let tried = |tried| is_held(Path::new("folder"), tried).map_err(|error| error.to_string());
        assert_eq!(tried(Ok(())), Ok(true));
        let failed = |kind: ErrorKind| tried(Err(TryLockError::Error(Error::from(kind))));
        assert_eq!(failed(ErrorKind::Unsupported), Ok(false));
        assert!(failed(ErrorKind::OutOfMemory).is_err());
        assert!(failed(ErrorKind::PermissionDenied).is_err());
        assert!(tried(Err(TryLockError::WouldBlock)).is_err_and(|error| error.contains("another")));
    }

    #[test]
    fn a_lock_ends_where_it_is_dropped_whoever_has_a_copy_of_the_handle() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = locked(folder.path()).expect("a folder that nobody has locked");
        // As in a process that was forked meanwhile.
        let copy = lock.as_ref().map(|lock| lock.0.try_clone());
        assert!(matches!(copy, Some(Ok(_))), "{copy:?}");
        assert!(locked(folder.path()).is_err(), "it was locked twice");
        drop(lock);
        assert!(matches!(locked(folder.path()), Ok(Some(_))));
        drop(copy);
    }
}
