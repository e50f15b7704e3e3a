//! Compiled pipelines on disk: what the driver gave comes back, nothing else gets to it, and processes do not harm each other's files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use libtest_mimic::{Completion, Failed, Trial};
use rankmix::device::PIPELINE_CACHE_VARIABLE;
use rankmix::{Device, DeviceOptions, Graph, ParameterStore, Tensor, TensorType};

fn open(folder: &Path) -> Result<Device, Failed> {
    Ok(Device::open_with(&DeviceOptions {
        request: Some("vulkan".to_owned()),
        pipeline_cache: Some(folder.to_owned()),
        ..DeviceOptions::default()
    })?)
}

/// Builds pipelines and runs them: 3² + 0.5.
fn nine_and_a_half(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([4]))?;
    let square = graph.square(x)?;
    let y = graph.affine(square, 1.0, 0.5)?;
    graph.output(y)?;
    let mut session = graph.compile(&ParameterStore::new(device))?;
    session.set("x", &Tensor::f32([4], vec![3.0; 4])?)?;
    session.run()?;
    assert_eq!(session.read(y)?.to_f32(), [9.5; 4]);
    Ok(())
}

/// The files in a folder, which may not be there.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn the_only_file(folder: &Path) -> Result<PathBuf, Failed> {
    match <[PathBuf; 1]>::try_from(files(folder)) {
        Ok([file]) => Ok(file),
        Err(found) => Err(format!("one file was to be there, not {found:?}").into()),
    }
}

fn a_second_device_builds_from_the_file() -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    let folder = root.path().join("made").join("when needed");
    let mut seconds = Vec::new();
    for written in [true, false] {
        let device = open(&folder)?;
        let begun = Instant::now();
        nine_and_a_half(&device)?;
        seconds.push(begun.elapsed().as_secs_f64());
        // The second device has nothing new to tell, unless the driver tells it otherwise.
        let saved = device.save_pipelines()?;
        assert!(
            saved || !written,
            "the first device's pipelines were not written"
        );
        assert!(!device.save_pipelines()?, "nothing new was written again");
        the_only_file(&folder)?;
    }
    println!(
        "pipelines of two kernels, built and run: {:.1} ms without the file, {:.1} ms with it",
        seconds[0] * 1e3,
        seconds[1] * 1e3
    );
    Ok(())
}

fn a_dropped_device_leaves_its_pipelines() -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    let device = open(root.path())?;
    let clone = device.clone();
    nine_and_a_half(&device)?;
    drop(device);
    assert!(files(root.path()).is_empty(), "a clone is still there");
    drop(clone);
    the_only_file(root.path())?;
    Ok(())
}

/// A process of its own that builds pipelines with a folder from the environment.
fn process(program: &str, folder: &Path) -> Result<Child, Failed> {
    process_saying(program, folder, Stdio::piped())
}

fn process_saying(program: &str, folder: &Path, stderr: Stdio) -> Result<Child, Failed> {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora_small.safetensors");
    Ok(Command::new(program)
        .args(["replay", "--device", "vulkan"])
        .arg(case)
        .env(PIPELINE_CACHE_VARIABLE, folder)
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()?)
}

/// What the crate said on stderr in a process, which must have ended well; drivers say things too.
fn said(child: Child) -> Result<String, Failed> {
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    let ours = stderr.lines().filter(|line| line.starts_with("rankmix:"));
    let said: Vec<&str> = ours.collect();
    Ok(said.join("\n"))
}

fn damaged_files_are_left_unused(program: &str) -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    assert_eq!(said(process(program, root.path())?)?, "");
    let file = the_only_file(root.path())?;
    let whole = fs::read(&file)?;
    assert_eq!(said(process(program, root.path())?)?, "");
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        bytes
    };
    let last = whole.len() - 1;
    // What else can be wrong with a file is tested without processes, where it is opened.
    for (damage, bytes) in [
        ("empty", Vec::new()),
        ("cut short", with(&|bytes| bytes.truncate(last))),
        ("a flipped bit in the data", with(&|bytes| bytes[last] ^= 1)),
        (
            "wgpu's data without our header",
            with(&|bytes| drop(bytes.drain(..32))),
        ),
    ] {
        fs::write(&file, bytes)?;
        let said = said(process(program, root.path())?)?;
        assert_eq!(said.lines().count(), 1, "{damage}: {said}");
        assert!(said.contains("is not used"), "{damage}: {said}");
        // The process has replaced the file, so that the next one does not complain.
        assert_eq!(fs::read(&file)?.len(), whole.len(), "{damage}");
    }
    // It works on where nobody reads what it says.
    fs::write(&file, &whole[..last])?;
    let (reader, nobody_reads) = std::io::pipe()?;
    drop(reader);
    let output = process_saying(program, root.path(), nobody_reads.into())?.wait_with_output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(&file)?.len(), whole.len());
    assert_eq!(said(process(program, root.path())?)?, "");
    Ok(())
}

fn a_folder_that_cannot_be_written_is_an_error_only_when_asked() -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    let file = root.path().join("a file, not a folder");
    fs::write(&file, b"")?;
    let device = open(&file)?;
    nine_and_a_half(&device)?;
    let error = device.save_pipelines().expect_err("no folder can be there");
    assert!(matches!(error, rankmix::Error::File { .. }), "{error}");
    Ok(())
}

fn processes_write_at_once(program: &str) -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    for _ in 0..2 {
        let children = [(); 3].map(|()| process(program, root.path()));
        for child in children {
            assert_eq!(said(child?)?, "");
        }
        the_only_file(root.path())?;
    }
    assert_eq!(said(process(program, root.path())?)?, "");
    Ok(())
}

/// Why nothing can be tested here, if so.
fn missing() -> Option<String> {
    let folder = tempfile::tempdir().ok()?;
    match open(folder.path()) {
        Err(error) => error.message().map(str::to_owned),
        Ok(device) => match device.adapter() {
            Some(adapter) if adapter.backend == "vulkan" => None,
            _ => Some("there is no Vulkan".to_owned()),
        },
    }
}

pub fn trials() -> Vec<Trial> {
    type Check = fn(&str) -> Result<(), Failed>;
    let checks: [(&str, Check); 5] = [
        ("a_second_device_builds_from_the_file", |_| {
            a_second_device_builds_from_the_file()
        }),
        ("a_dropped_device_leaves_its_pipelines", |_| {
            a_dropped_device_leaves_its_pipelines()
        }),
        (
            "a_folder_that_cannot_be_written_is_an_error_only_when_asked",
            |_| a_folder_that_cannot_be_written_is_an_error_only_when_asked(),
        ),
        (
            "damaged_files_are_left_unused",
            damaged_files_are_left_unused,
        ),
        ("processes_write_at_once", processes_write_at_once),
    ];
    let trial = |(name, check): (&str, Check)| {
        Trial::ignorable_test(format!("pipeline_cache::{name}::vulkan"), move || {
            if let Some(reason) = missing() {
                return Ok(Completion::ignored_with(reason));
            }
            let Some(program) = option_env!("CARGO_BIN_EXE_rankmix") else {
                return Ok(Completion::ignored_with(
                    "there is no program without the feature `cli`",
                ));
            };
            check(program).map(|()| Completion::Completed)
        })
    };
    checks.into_iter().map(trial).collect()
}
