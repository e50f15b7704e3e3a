//! What a conversion finds of an earlier one: gone on with if it is of the same, refused and left as it is if not.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rankmix::Result;
use rankmix::convert::{LatentOptions, ModelOptions, ModelReport, Progress, convert_model};
use rankmix::formats::Dtype;
use serde_json::{Value, json};

use super::damaged::contents;
use super::written::{Family, write_tensors};

const TOKENS: usize = 40;

struct Case {
    folder: tempfile::TempDir,
    options: ModelOptions,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let model = Family::Olmoe.model(3, Dtype::F32);
        model.write(&folder.path().join("in"), 1);
        let options = ModelOptions::new(LatentOptions::new(2, 5));
        Self { folder, options }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn convert_from(&self, source: &Path) -> Result<ModelReport> {
        convert_model(source, &self.at("out"), &self.options, &|_| {})
    }

    fn convert(&self) -> Result<ModelReport> {
        self.convert_from(&self.at("in"))
    }

    /// The report in a folder, changed.
    fn edit(&self, folder: &str, change: impl FnOnce(&mut Value)) {
        let path = self.at(folder).join("conversion.json");
        let text = fs::read_to_string(&path).expect("the report");
        let mut report = serde_json::from_str(&text).expect("JSON");
        change(&mut report);
        fs::write(path, report.to_string()).expect("a file");
    }

    /// The output as if everything but its new name had been done.
    fn unfinish(&self) {
        fs::rename(self.at("out"), self.at("out.partial")).expect("the output");
        self.edit("out.partial", |report| report["unfinished"] = json!(true));
    }

    /// All files of the output but the report.
    fn result(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = contents(&self.at("out"));
        all.retain(|(path, _)| !path.ends_with("conversion.json"));
        all
    }

    /// Refused with these words; what is there stays.
    fn assert_refused(&self, source: &Path, words: &[&str]) {
        let before = contents(&self.at("out.partial"));
        let error = self.convert_from(source).expect_err("it must be refused");
        let message = error.to_string();
        for word in words.iter().chain(&["restart"]) {
            assert!(message.contains(word), "`{message}` does not name {word}");
        }
        assert!(contents(&self.at("out.partial")) == before && !self.at("out").exists());
    }

    /// Gone on with: nothing is written again.
    fn assert_resumed(&self, source: &Path) {
        let report = self.convert_from(source).expect("it goes on");
        assert_eq!(report.run.files_written, 0);
        self.unfinish();
    }

    fn write_calibration(&mut self, path: &str, seed: u64) {
        let model = Family::Olmoe.model(3, Dtype::F32);
        write_tensors(&self.at(path), &model.inputs(TOKENS, seed));
    }
}

/// Another time than the file has, whatever the clock of the file system can tell apart.
fn touch(path: &Path) {
    let file = fs::File::options().write(true).open(path).expect("a file");
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    file.set_modified(time).expect("a file of ours");
}

/// Does something to the bytes of a file.
type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);

#[test]
fn damaged_files_are_written_again() -> Result<()> {
    let case = Case::new();
    case.convert()?;
    let whole = case.result();
    let length = |bytes: &mut Vec<u8>| bytes[0] ^= 1;
    let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let empty = |bytes: &mut Vec<u8>| bytes.clear();
    // The first letter of a tensor's name, which leaves a sound file of another tensor.
    let name = |bytes: &mut Vec<u8>| {
        let at = bytes.windows(7).position(|window| window == b"\"model.");
        bytes[at.expect("a name") + 1] = b'x';
    };
    // The number of elements is the same: the file is sound, and of another shape.
    let shape = |bytes: &mut Vec<u8>| {
        let at = bytes.windows(7).position(|window| window == b"shape\":");
        let shape = at.expect("a shape") + 8;
        let end = bytes[shape..].iter().position(|byte| *byte == b']');
        let text = bytes[shape..shape + end.expect("the shape's end")].to_vec();
        let mut turned: Vec<&[u8]> = text.split(|byte| *byte == b',').collect();
        turned.reverse();
        assert!(turned.len() == 2 && turned[0] != turned[1]);
        bytes[shape..shape + text.len()].copy_from_slice(&turned.join(&b','));
    };
    let damages: [Damage<'_>; 5] = [&length, &half, &empty, &name, &shape];
    for file in [1, 3] {
        for damage in damages {
            case.unfinish();
            let path = case
                .at("out.partial")
                .join(format!("model-0000{file}-of-00004.safetensors"));
            let mut bytes = fs::read(&path).expect("a file of the output");
            damage(&mut bytes);
            fs::write(&path, &bytes).expect("a file");
            let report = case.convert()?;
            assert_eq!(report.run.files_written, 1);
            assert!(case.result() == whole);
        }
    }
    Ok(())
}

#[test]
fn another_source_is_refused() -> Result<()> {
    let mut case = Case::new();
    case.convert()?;
    case.unfinish();
    let source = case.at("in");
    // The same path, spelled otherwise.
    case.assert_resumed(&case.at("in/more/../../in/"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("in", case.at("link")).expect("a link");
        case.assert_resumed(&case.at("link"));
    }
    // The same model in another place: names, sizes and times are equal.
    let other = case.at("other");
    fs::create_dir(&other).expect("a folder");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(source.join(name), other.join(name)).expect("a file");
        let time = fs::metadata(source.join(name)).and_then(|facts| facts.modified());
        let file = fs::File::options().write(true).open(other.join(name));
        file.and_then(|file| file.set_modified(time?))
            .expect("a file of ours");
    }
    case.assert_refused(&other, &["path", "other", "another source"]);
    // A file of it was changed.
    case.assert_resumed(&source);
    let config = source.join("config.json");
    let text = fs::read_to_string(&config).expect("a file");
    fs::write(&config, format!("{text} ")).expect("a file");
    let bytes = format!("bytes {}, now {}", text.len(), text.len() + 1);
    case.assert_refused(&source, &["files config.json", &bytes]);
    touch(&source.join("model.safetensors"));
    case.assert_refused(&source, &["files model.safetensors modified"]);
    // Until a new start is asked for, which says what it throws away.
    case.options.restart = true;
    let told = std::sync::Mutex::new(String::new());
    let listener = |progress: Progress<'_>| {
        if let Progress::Notice(text) = progress {
            told.lock().expect("nobody panics").push_str(text);
        }
    };
    let report = convert_model(&source, &case.at("out"), &case.options, &listener)?;
    assert_eq!(report.run.files_of_earlier_runs, 0);
    let told = told.into_inner().expect("nobody panics");
    assert!(told.contains("thrown away") && told.contains("config.json"));
    Ok(())
}

#[test]
fn another_calibration_is_refused() -> Result<()> {
    let mut case = Case::new();
    fs::create_dir(case.at("inputs")).expect("a folder");
    case.write_calibration("inputs/model.safetensors", 3);
    case.write_calibration("other.safetensors", 3);
    case.options.calibration = Some(case.at("inputs"));
    case.convert()?;
    case.unfinish();
    let source = case.at("in");
    case.assert_resumed(&source);
    // The file of the folder is the same calibration.
    case.options.calibration = Some(case.at("inputs/../inputs/model.safetensors"));
    case.assert_resumed(&source);
    case.options.calibration = Some(case.at("other.safetensors"));
    case.assert_refused(&source, &["calibration path", "inputs"]);
    case.options.calibration = None;
    case.assert_refused(&source, &["calibration true, now false"]);
    // Other numbers of the same size under the same name, given as a folder.
    case.options.calibration = Some(case.at("inputs"));
    case.assert_resumed(&source);
    case.write_calibration("inputs/model.safetensors", 4);
    touch(&case.at("inputs/model.safetensors"));
    case.assert_refused(&source, &["calibration files model.safetensors modified"]);
    Ok(())
}

#[test]
fn what_cannot_be_read_is_thrown_away_if_that_is_asked_for() -> Result<()> {
    let mut case = Case::new();
    case.convert()?;
    let whole = case.result();
    for text in [&b"{\"unfinished\": tr"[..], b"", &[0xff, 0xfe]] {
        case.unfinish();
        let report = case.at("out.partial/conversion.json");
        fs::write(&report, text).expect("a file");
        case.options.restart = false;
        case.assert_refused(&case.at("in"), &["conversion.json"]);
        case.options.restart = true;
        let report = case.convert()?;
        assert_eq!(report.run.files_of_earlier_runs, 0);
        assert!(case.result() == whole);
    }
    Ok(())
}

#[test]
fn another_arithmetic_is_refused() -> Result<()> {
    let case = Case::new();
    case.convert()?;
    case.unfinish();
    let mut words = String::new();
    case.edit("out.partial", |report| {
        let version = report["options"]["arithmetic"].as_u64().expect("a number");
        report["options"]["arithmetic"] = json!(version + 1);
        words = format!("arithmetic {}, now {version}", version + 1);
    });
    case.assert_refused(&case.at("in"), &[&words]);
    Ok(())
}

#[test]
fn a_finished_one_that_has_not_got_its_name_is_not_an_old_output() -> Result<()> {
    let mut case = Case::new();
    case.convert()?;
    case.options.latent.latent = 4;
    fs::rename(case.at("out"), case.at("old")).expect("the output");
    case.convert()?;
    // A run over an old output was ended right before the exchange; the next is asked for something else.
    fs::rename(case.at("out"), case.at("out.partial")).expect("the output");
    fs::rename(case.at("old"), case.at("out")).expect("the output");
    touch(&case.at("out/conversion.json"));
    case.options.latent.latent = 3;
    case.options.overwrite = true;
    let before = [contents(&case.at("out")), contents(&case.at("out.partial"))];
    // As the old output is, or as neither is.
    for latent in [5, 3] {
        case.options.latent.latent = latent;
        let error = case.convert().expect_err("it must be refused").to_string();
        let differs = format!("latent 4, now {latent}");
        assert!(error.contains(&differs), "{error}");
        assert!(before == [contents(&case.at("out")), contents(&case.at("out.partial"))]);
    }
    // The other way round it was ended right after it: what is left is the old output.
    touch(&case.at("out.partial/conversion.json"));
    fs::write(
        case.at("out/conversion.json"),
        fs::read(case.at("out/conversion.json")).expect("the report"),
    )
    .expect("a file");
    case.convert()?;
    assert!(!case.at("out.partial").exists());
    Ok(())
}

#[test]
fn inputs_lie_in_nothing_that_is_removed() -> Result<()> {
    let mut case = Case::new();
    case.convert()?;
    case.options.overwrite = true;
    case.options.restart = true;
    case.write_calibration("out/inputs.safetensors", 3);
    case.options.calibration = Some(case.at("out/inputs.safetensors"));
    let error = case.convert().expect_err("it must be refused").to_string();
    assert!(error.contains("in each other"), "{error}");
    assert!(case.at("out/inputs.safetensors").exists());
    case.options.calibration = None;
    for taken in ["out.partial", "out.previous"] {
        fs::rename(case.at("in"), case.at(taken)).expect("the source");
        let error = case.convert_from(&case.at(taken));
        let error = error.expect_err("it must be refused").to_string();
        assert!(error.contains("in each other"), "{error}");
        assert!(case.at(taken).join("model.safetensors").exists());
        fs::rename(case.at(taken), case.at("in")).expect("the source");
    }
    Ok(())
}
