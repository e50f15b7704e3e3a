//! Writers of an adapter's folder that are cut short.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rankmix::formats::{Adapter, LoraPair, MixtureAdapter, MixtureKind, PeftAdapter, Target};
use rankmix::{Error, Tensor};

use crate::mixture;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// An adapter whose alpha is what all its elements are.
fn lora(alpha: f32) -> PeftAdapter {
    const RANK: usize = 4;
    let all = |dims: [usize; 2]| {
        Tensor::f32(dims, vec![alpha; dims[0] * dims[1]]).expect("as many as there are")
    };
    let pair = LoraPair {
        target: Target::Linear,
        a: all([RANK, 512]),
        b: all([512, RANK]),
        bias: None,
        scale: f64::from(alpha) / RANK as f64,
    };
    PeftAdapter::of_pairs(BTreeMap::from([("model.layer".to_owned(), pair)]))
}

/// Moves the configuration to where a writer has it that is putting the new files into their places.
fn cut_short(folder: &Path) {
    let staged = folder.join("adapter.writing-0");
    fs::create_dir(&staged).expect("a folder that can be written to");
    fs::rename(
        folder.join(CONFIG),
        staged.join("previous_adapter_config.json"),
    )
    .expect("a configuration");
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let name = |entry: fs::DirEntry| entry.file_name().into_string().expect("a name of ours");
    let mut names: Vec<String> = entries
        .map(|entry| name(entry.expect("an entry")))
        .collect();
    names.sort();
    names
}

#[test]
fn tensors_without_their_configuration_are_no_adapter_until_it_is_written_again() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let words = ["is missing", "cut short", "adapter.writing-0"];
    lora(2.0).write(folder).expect("a folder of its own");
    fs::write(folder.join("README.md"), "mine").expect("a folder of its own");
    cut_short(folder);
    assert_damaged!(PeftAdapter::read(folder), words[0], words[1], words[2]);
    assert_damaged!(Adapter::read(folder), words[0], words[1], words[2]);
    lora(4.0).write(folder).expect("a folder of its own");
    let read = PeftAdapter::read(folder).expect("written again");
    assert_eq!(read, lora(4.0));
    assert_eq!(
        names(folder),
        ["README.md", "adapter.writing-0", CONFIG, TENSORS]
    );
    assert_eq!(
        names(&folder.join("adapter.writing-0")),
        ["previous_adapter_config.json"]
    );

    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let adapter = mixture::adapter(MixtureKind::RotMole);
    adapter.write(folder).expect("a folder of its own");
    cut_short(folder);
    assert_damaged!(MixtureAdapter::read(folder), words[0], words[1], words[2]);
    adapter.write(folder).expect("a folder of its own");
    let read = MixtureAdapter::read(folder).expect("written again");
    assert_eq!(read, adapter);
}

/// Which of several left folders goes with the tensors cannot be told: none is named as the one to take by hand.
#[test]
fn after_several_writers_that_were_cut_short_nothing_is_to_be_put_together() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    lora(2.0).write(folder).expect("a folder of its own");
    cut_short(folder);
    let reason = |words: &[&str], not: &str| {
        let error = PeftAdapter::read(folder).expect_err("there is no configuration");
        let text = error.to_string();
        let all = words.iter().all(|word| text.contains(word));
        assert!(all && !text.contains(not), "{text}");
    };
    let previous = "previous_adapter_config.json";
    reason(&["adapter.writing-0", previous], "Several");
    let staged = folder.join("adapter.writing-0");
    fs::rename(staged.join(previous), staged.join(CONFIG)).expect("a file");
    reason(&["adapter.writing-0 has"], previous);
    fs::create_dir(folder.join("adapter.writing-1")).expect("a folder of its own");
    reason(
        &[
            "adapter.writing-0, adapter.writing-1",
            "write the adapter again",
        ],
        previous,
    );
}

/// The configuration of a folder without tensors of this format comes back too.
#[test]
fn a_writer_that_fails_keeps_the_only_configuration() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    fs::write(folder.join(CONFIG), "{}").expect("a folder of its own");
    fs::create_dir(folder.join(TENSORS)).expect("a folder of its own");
    fs::write(folder.join(TENSORS).join("mine"), "mine").expect("a folder of its own");
    let failed = lora(4.0).write(folder);
    assert!(matches!(failed, Err(Error::File { .. })), "{failed:?}");
    assert_eq!(names(folder), [CONFIG, TENSORS]);
    assert_eq!(
        fs::read_to_string(folder.join(CONFIG)).expect("a file"),
        "{}"
    );
}

#[test]
fn a_writer_that_fails_leaves_the_old_adapter() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    lora(2.0).write(folder).expect("a folder of its own");
    // No file takes the place of a folder that is not empty.
    let (tensors, aside) = (folder.join(TENSORS), folder.join("aside"));
    fs::rename(&tensors, &aside).expect("a file");
    fs::create_dir(&tensors).expect("a folder of its own");
    fs::write(tensors.join("mine"), "mine").expect("a folder of its own");
    let failed = lora(4.0).write(folder);
    assert!(matches!(failed, Err(Error::File { .. })), "{failed:?}");
    assert_eq!(names(folder), [CONFIG, TENSORS, "aside"]);
    fs::remove_dir_all(&tensors).expect("a folder");
    fs::rename(&aside, &tensors).expect("a file");
    let read = PeftAdapter::read(folder).expect("what was there");
    assert_eq!(read, lora(2.0));
}

/// Writes two adapters in turns until it is killed; for the test below.
#[test]
#[ignore = "the process that another test kills"]
fn writes_in_turns() {
    let Ok(folder) = std::env::var("RANKMIX_WRITE_IN_TURNS") else {
        return;
    };
    println!("in turns");
    for alpha in [2.0, 4.0].into_iter().cycle() {
        lora(alpha).write(&folder).expect("a folder of the test");
    }
}

// Windows replaces no file that is mapped: there it is the writer that fails.
#[cfg(unix)]
#[test]
fn a_killed_writer_leaves_an_adapter_or_none_and_readers_beside_it_find_no_mixed_one() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let mut whole = 0;
    let mut look = |after_kill: bool| match PeftAdapter::read(folder) {
        Ok(read) => {
            whole += 1;
            let alpha = read.pairs["model.layer"].a.to_f32()[0];
            assert!(read == lora(alpha), "alpha of another adapter: {read:?}");
        }
        Err(Error::Format { reason, .. }) => {
            let between = reason.contains("is missing") || reason.contains("was replaced");
            assert!(between, "{reason}");
            assert!(!(after_kill && reason.contains("was replaced")), "{reason}");
        }
        Err(error) => panic!("{error:?}"),
    };
    for round in 0..30_u64 {
        lora(2.0).write(folder).expect("a folder of its own");
        let mut writer = Command::new(std::env::current_exe().expect("this program"))
            .args(["adapter_folder::writes_in_turns", "--exact", "--ignored"])
            .arg("--nocapture")
            .env("RANKMIX_WRITE_IN_TURNS", folder)
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program");
        let lines = BufReader::new(writer.stdout.take().expect("a pipe")).lines();
        let mut lines = lines.map(|line| line.expect("text"));
        assert!(lines.any(|line| line.contains("in turns")), "it wrote none");
        let until = Instant::now() + Duration::from_millis(3 + round % 7);
        while Instant::now() < until {
            look(false);
        }
        writer.kill().expect("a process of this test");
        writer.wait().expect("a process of this test");
        look(true);
    }
    assert!(whole > 0, "no adapter was ever found whole");
}
