//! Models written in several files.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rankmix::Error;
use rankmix::formats::{Dtype, ModelWriter, OutputTensor};

fn floats(name: &str, shape: &[usize], elements: &[f32], dtype: Dtype) -> OutputTensor<'static> {
    OutputTensor::floats(name.to_owned(), shape, Cow::Owned(elements.to_vec()), dtype)
        .expect("numbers that fit their type")
}

#[test]
fn one_name_is_one_tensor() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let writer = ModelWriter::new(folder.path());
    let twice = vec![
        floats("a", &[2], &[1.0, 2.0], Dtype::F32),
        floats("a", &[2], &[3.0, 4.0], Dtype::F32),
    ];
    let error = writer.write_shard("one.safetensors", twice, BTreeMap::new());
    let error = error.expect_err("two tensors of one name");
    assert!(
        matches!(&error, Error::DuplicateName { name, .. } if name == "a"),
        "{error}"
    );
    assert!(!folder.path().join("one.safetensors").exists());
}

#[test]
fn extents_that_cannot_be_counted_are_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let writer = ModelWriter::new(folder.path());
    let odd = vec![floats("a", &[usize::MAX, 2], &[1.0, 2.0], Dtype::F32)];
    let error = writer.write_shard("one.safetensors", odd, BTreeMap::new());
    let error = error.expect_err("more elements than can be counted");
    assert!(error.to_string().contains("`a`"), "{error}");
}

#[test]
fn numbers_beyond_their_type_are_refused() {
    let tensor = |number: f32, dtype| {
        OutputTensor::floats("a".to_owned(), &[2], Cow::Owned(vec![1.0, number]), dtype)
    };
    for (number, dtype) in [(65_520.0, Dtype::F16), (3.4e38, Dtype::BF16)] {
        let error = tensor(number, dtype).expect_err("beyond the largest number");
        assert!(
            matches!(&error, Error::Limit { thing, .. } if thing.contains("`a`")),
            "{error}"
        );
        assert!(tensor(number, Dtype::F32).is_ok());
    }
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for number in [f32::NAN, f32::INFINITY] {
            let error = tensor(number, dtype).expect_err("no number");
            assert!(
                matches!(error, Error::NotFinite { element: 1, .. }),
                "{error}"
            );
        }
    }
}

/// Whoever may read a new file here may read the tensors.
#[cfg(unix)]
#[test]
fn tensors_are_for_whom_new_files_are() {
    use rankmix::formats::Checkpoint;
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().expect("a folder of its own");
    let plain = folder.path().join("plain");
    std::fs::File::create(&plain).expect("a file");
    let writer = ModelWriter::new(folder.path());
    let tensors = vec![floats("a", &[2], &[1.0, 2.0], Dtype::F32)];
    writer
        .write_shard("one.safetensors", tensors, BTreeMap::new())
        .expect("a folder of its own");
    let path = folder.path().join("one.safetensors");
    let [mode, expected] = [&path, &plain].map(|path| {
        let metadata = std::fs::metadata(path).expect("a file");
        metadata.permissions().mode()
    });
    assert_eq!(mode, expected);
    let read = Checkpoint::open(path).expect("just written");
    assert_eq!(read.tensor("a").expect("just written").to_f32(), [1.0, 2.0]);
}
