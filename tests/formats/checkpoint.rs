use std::fs;
use std::path::Path;

use rankmix::formats::{Checkpoint, Dtype, TensorFile};
use rankmix::{Error, Tensor};

fn floats(shape: &[usize], from: f32) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| from + i as f32);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

fn file_of(tensors: &[(&str, Tensor)]) -> TensorFile {
    let tensors = tensors.iter();
    TensorFile {
        tensors: tensors
            .map(|(name, tensor)| ((*name).to_owned(), tensor.clone()))
            .collect(),
        metadata: [("format".to_owned(), "pt".to_owned())].into(),
    }
}

/// A header and data, whether they fit or not.
fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn opened(folder: &Path, bytes: &[u8]) -> rankmix::Result<Checkpoint> {
    let path = folder.join("model.safetensors");
    fs::write(&path, bytes).expect("a folder that can be written to");
    Checkpoint::open(path)
}

#[test]
fn a_model_in_several_files_is_read_as_one() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let (one, two, three) = (
        floats(&[2, 3], 0.0),
        floats(&[4], 10.0),
        floats(&[1, 5], 20.0),
    );
    let parts = [
        (
            "model-00001-of-00002.safetensors",
            file_of(&[("a", one.clone()), ("b", two.clone())]),
        ),
        (
            "model-00002-of-00002.safetensors",
            file_of(&[("c", three.clone())]),
        ),
    ];
    for (name, file) in &parts {
        file.write(folder.path().join(name))
            .expect("a folder that can be written to");
    }
    let index = folder.path().join("model.safetensors.index.json");
    let map = |c: &str| {
        format!(
            r#"{{"metadata": {{"total_size": 60}}, "weight_map": {{"a": "{}", "b": "{}", "c": "{c}"}}}}"#,
            parts[0].0, parts[0].0
        )
    };
    fs::write(&index, map(parts[1].0)).expect("a folder that can be written to");
    let model = Checkpoint::open(folder.path()).expect("a sound model");
    let names: Vec<_> = model.tensors().map(|(name, _)| name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for (name, tensor) in [("a", &one), ("b", &two), ("c", &three)] {
        assert_eq!(
            &model.tensor(name).expect("a tensor that was listed"),
            tensor
        );
        let bytes: &[u8] = bytemuck::cast_slice(tensor.as_f32().expect("floats"));
        assert_eq!(model.raw(name).expect("a tensor that was listed"), bytes);
    }
    let entry = model.entry("c").expect("a tensor that was listed");
    assert_eq!(
        (entry.dtype, entry.shape.as_slice(), entry.bytes()),
        (Dtype::F32, [1, 5].as_slice(), 20)
    );
    assert_eq!(model.files().count(), 2);
    let missing = model.tensor("d");
    assert!(
        matches!(missing, Err(Error::UnknownName { .. })),
        "{missing:?}"
    );

    // An index that lies.
    for (file, word) in [
        (parts[0].0, "does not hold it"),
        ("../secret.safetensors", "no plain file name"),
        ("/etc/passwd", "no plain file name"),
    ] {
        fs::write(&index, map(file)).expect("a folder that can be written to");
        assert_damaged!(Checkpoint::open(folder.path()), "tensor `c`", file, word);
    }
    fs::write(&index, map("absent.safetensors")).expect("a folder that can be written to");
    let error = Checkpoint::open(folder.path()).expect_err("a file is missing");
    assert!(
        matches!(error, Error::File { .. }) && error.to_string().contains("absent"),
        "{error}"
    );
    fs::write(&index, "{\"weight_map\": 3}").expect("a folder that can be written to");
    assert_damaged!(Checkpoint::open(folder.path()), "index.json", "line");
    fs::remove_file(&index).expect("the file just written");
    assert_damaged!(Checkpoint::open(folder.path()), "holds none of");
}

#[test]
fn the_same_name_in_two_files_is_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    for name in ["1.safetensors", "2.safetensors"] {
        let path = folder.path().join(name);
        let tensors = [("a", floats(&[2], 0.0)), (name, floats(&[2], 0.0))];
        file_of(&tensors)
            .write(path)
            .expect("a folder that can be written to");
    }
    let index =
        r#"{"weight_map": {"1.safetensors": "1.safetensors", "2.safetensors": "2.safetensors"}}"#;
    fs::write(folder.path().join("model.safetensors.index.json"), index)
        .expect("a folder that can be written to");
    assert_damaged!(
        Checkpoint::open(folder.path()),
        "`a`",
        "1.safetensors",
        "2.safetensors"
    );
}

#[test]
fn damaged_headers_are_refused_with_name_and_offset() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let open = |bytes: &[u8]| opened(folder.path(), bytes);
    let entry = |name: &str, shape: &str, from: usize, to: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = |shape: &str, from: usize, to: usize, data: usize| {
        open(&raw(
            &format!("{{{}}}", entry("the.weight", shape, from, to)),
            data,
        ))
    };
    assert!(one("[2,3]", 0, 24, 24).is_ok(), "the sound one of them");
    assert_damaged!(open(&[1, 2, 3]), "byte 0", "8 bytes", "has 3");
    assert_damaged!(
        open(&u64::MAX.to_le_bytes()),
        "byte 0",
        "18446744073709551615"
    );
    assert_damaged!(open(&raw("{\"a\":", 0)), "byte 8", "JSON");
    assert_damaged!(
        one("[2,3]", 0, 24, 20),
        "the.weight",
        "offset 0",
        "the file at byte"
    );
    assert_damaged!(one("[2,3]", 0, 24, 28), "4 bytes of no tensor");
    assert_damaged!(
        one("[2,4]", 0, 24, 24),
        "the.weight",
        "[2, 4]",
        "32 bytes",
        "24"
    );
    assert_damaged!(
        one("[2,3]", 8, 32, 32),
        "the.weight",
        "offset 8",
        "ends at 0"
    );
    assert_damaged!(one("[2,3]", 24, 0, 24), "the.weight", "before it begins");
    assert_damaged!(
        one("[4294967296,4294967296]", 0, 24, 24),
        "the.weight",
        "more elements"
    );
    let two = format!(
        "{{{},{}}}",
        entry("one", "[4]", 0, 16),
        entry("other", "[4]", 8, 24)
    );
    assert_damaged!(open(&raw(&two, 24)), "other", "offset 8", "ends at 16");
    assert_damaged!(
        open(&raw(
            r#"{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#,
            4
        )),
        "w",
        "F99"
    );
    // A type that is known and not read is listed, and refused by name when it is asked for.
    let model = open(&raw(
        r#"{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#,
        4,
    ))
    .expect("a sound header");
    assert_damaged!(model.tensor("w"), "`w`", "F8_E4M3");
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("whole.safetensors");
    file_of(&[("a", floats(&[2, 3], 0.0)), ("b", floats(&[4], 1.0))])
        .write(&path)
        .expect("a folder that can be written to");
    let whole = fs::read(&path).expect("the file just written");
    let header = whole.first_chunk().expect("the header's length");
    let data = 8 + u64::from_le_bytes(*header) as usize;
    for cut in 0..whole.len() {
        // Where it ends is what is wrong with it.
        let words = if cut < data {
            format!("the file has {cut}")
        } else {
            format!("the file at byte {cut}")
        };
        assert_damaged!(opened(folder.path(), &whole[..cut]), words.as_str());
    }
}
