//! The program is killed at many moments: the output is absent or the old one entire, and the next run goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rankmix::formats::Dtype;

use super::damaged::contents;
use super::written::Family;

const LAYERS: usize = 12;
/// What the system says of a process that was killed.
const SIGKILL: i32 = 9;
/// So often a moment is waited for that the program has run past.
const ATTEMPTS: usize = 100;
/// Far beyond what any step takes: the test ends, and fails, where a process hangs.
const PATIENCE: Duration = Duration::from_secs(120);

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let source = folder.path().join("in");
        Family::Qwen2.model(LAYERS, Dtype::F32).write(&source, 2);
        Self { folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, out: &str, more: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_rankmix"))
            .args(["convert", "moe-to-latent", "--groups", "2", "--latent", "5"])
            .args(more)
            .args([self.at("in"), self.at(out)])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program")
    }

    /// Runs to the end.
    fn finish(&self, out: &str, more: &[&str]) {
        let output = self
            .start(out, more)
            .wait_with_output()
            .expect("the program");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{message}");
        assert!(!self.at(&format!("{out}.partial")).exists());
    }

    /// Starts, kills as soon as `is_time` says so, and returns whether that has ended the program: it may have come to its end by itself.
    fn kill_when(&self, out: &str, more: &[&str], is_time: impl Fn() -> bool) -> bool {
        let mut child = self.start(out, more);
        let begin = Instant::now();
        while child.try_wait().expect("a process of ours").is_none() && !is_time() {
            assert!(begin.elapsed() < PATIENCE, "the program hangs");
        }
        child.kill().expect("a process of ours");
        let status = child.wait().expect("a process of ours");
        let killed = status.signal() == Some(SIGKILL);
        assert!(killed || status.success(), "{status}");
        killed
    }
}

/// The entries of a folder, with the number of the file behind each name; none if the folder is not there.
fn entries(folder: &Path) -> BTreeSet<(PathBuf, u64)> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let numbered = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        Some((entry.path(), entry.metadata().ok()?.ino()))
    });
    numbered.collect()
}

/// Something that is seen from outside.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So many entries have appeared that were not there at the start, temporary ones among them.
    New(usize),
    /// All that is left to do is to give the folder its name.
    AboutToBeRenamed,
    /// The output is another folder.
    Exchanged,
}

impl Moment {
    /// Whether it has come, to be asked while the program runs.
    fn watch(self, case: &Case) -> impl Fn() -> bool {
        let (out, partial) = (case.at("out"), case.at("out.partial"));
        let number = |path: &Path| fs::metadata(path).map_or(0, |facts| facts.ino());
        let (before, old) = (entries(&partial), number(&out));
        move || match self {
            Self::New(count) => entries(&partial).difference(&before).count() > count,
            Self::AboutToBeRenamed => is_about_to_be_renamed(&partial),
            Self::Exchanged => number(&out) != old,
        }
    }
}

/// The files of tensors that are whole: by name, which file it is and when it was written.
fn shards(folder: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let Ok(entries) = fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let facts = entry.metadata().ok()?;
            name.ends_with(".safetensors")
                .then(|| (name, (facts.ino(), facts.mtime(), facts.mtime_nsec())))
        })
        .collect()
}

/// All files of an output, the report without what belongs to the run.
fn result(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = contents(folder);
    for (path, bytes) in &mut all {
        if path.ends_with("conversion.json") {
            let mut report: serde_json::Value = serde_json::from_slice(bytes).expect("JSON");
            assert!(
                report.get("unfinished").is_none(),
                "an output that is not finished"
            );
            report
                .as_object_mut()
                .and_then(|report| report.remove("run"));
            *bytes = report.to_string().into_bytes();
        }
        *path = path
            .strip_prefix(folder)
            .expect("a path in the folder")
            .to_owned();
    }
    all
}

/// A partial folder whose report is that of a finished conversion: what is left to do is to give it its name.
fn is_about_to_be_renamed(partial: &Path) -> bool {
    let text = fs::read_to_string(partial.join("conversion.json"));
    text.is_ok_and(|text| text.contains("totals"))
}

#[test]
fn killed_after_every_file_it_goes_on_where_it_was() {
    let case = Case::new();
    case.finish("whole", &[]);
    let whole = result(&case.at("whole"));
    let (out, partial) = (case.at("out"), case.at("out.partial"));
    let mut kept = BTreeMap::new();
    let mut kills = 0;
    for _ in 0..ATTEMPTS {
        kept.clear();
        kills = 0;
        // One file more is written before each kill.
        while !out.exists() {
            let count = kept.len();
            kills += usize::from(case.kill_when("out", &[], || shards(&partial).len() > count));
            let now = shards(if out.exists() { &out } else { &partial });
            for (name, facts) in &kept {
                assert_eq!(now.get(name), Some(facts), "{name} was written again");
            }
            kept = now;
        }
        let resumed = result(&out);
        let names = |all: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
            all.iter().map(|(path, _)| path.clone()).collect()
        };
        assert_eq!(names(&resumed), names(&whole));
        assert!(
            resumed == whole,
            "an interrupted conversion gives another result"
        );
        fs::remove_dir_all(&out).expect("the output");
        if kills >= 3 {
            break;
        }
    }
    assert!(
        kills >= 3,
        "the program was too fast to be killed: {kills} times"
    );
}

#[test]
fn killed_at_any_moment_the_output_is_absent_or_whole() {
    let case = Case::new();
    case.finish("whole", &[]);
    let whole = result(&case.at("whole"));
    let out = case.at("out");
    let moments = (0..15).map(Moment::New).chain([Moment::AboutToBeRenamed]);
    let mut missed = Vec::new();
    for (number, moment) in moments.enumerate() {
        let killed = (0..ATTEMPTS).any(|_| {
            let killed = case.kill_when("out", &["--jobs", "2"], moment.watch(&case));
            if out.exists() {
                assert!(result(&out) == whole);
                fs::remove_dir_all(&out).expect("the output");
            }
            killed
        });
        if !killed {
            missed.push(moment);
        }
        // Every third goes on where the one before was killed; the others after several kills.
        if number % 3 == 0 {
            case.finish("out", &[]);
            assert!(result(&out) == whole);
            fs::remove_dir_all(&out).expect("the output");
        }
    }
    assert!(missed.len() <= 4, "never killed at {missed:?}");
}

#[test]
fn killed_over_an_old_output_that_is_there_entire_or_the_new_one() {
    let case = Case::new();
    case.finish("new", &[]);
    case.finish("old", &["--factored-down"]);
    let (new, old) = (result(&case.at("new")), result(&case.at("old")));
    assert!(new != old);
    let out = case.at("out");
    case.finish("out", &["--factored-down"]);
    assert!(result(&out) == old);
    let moments = (0..16)
        .step_by(3)
        .map(Moment::New)
        .chain([Moment::AboutToBeRenamed, Moment::Exchanged]);
    let (mut missed, mut at_the_end) = (Vec::new(), 0);
    for (number, moment) in moments.enumerate() {
        let killed = (0..ATTEMPTS).any(|_| {
            let killed = case.kill_when("out", &["--overwrite"], moment.watch(&case));
            let found = result(&out);
            assert!(
                found == old || found == new,
                "neither the old output nor the new one"
            );
            at_the_end += usize::from(killed && found == new);
            if number % 3 == 2 {
                case.finish("out", &["--overwrite"]);
                assert!(result(&out) == new);
            }
            // Back to the old one.
            if result(&out) == new {
                case.finish("out", &["--overwrite", "--restart", "--factored-down"]);
                assert!(result(&out) == old);
            }
            killed
        });
        if !killed {
            missed.push(moment);
        }
    }
    assert!(missed.len() <= 2, "never killed at {missed:?}");
    assert!(at_the_end > 0, "never killed behind the exchange");
}

#[test]
fn two_at_once_do_not_share_a_folder() {
    let case = Case::new();
    let partial = case.at("out.partial");
    fs::create_dir(&partial).expect("a folder");
    let holder = fs::File::open(&partial).expect("the folder");
    holder.lock().expect("a file system with locks");
    let output = case
        .start("out", &[])
        .wait_with_output()
        .expect("the program");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("another process"), "{message}");
    // Closing alone would leave the lock to a process that another test has just forked.
    holder.unlock().expect("it was locked");
    case.finish("out", &[]);
}
