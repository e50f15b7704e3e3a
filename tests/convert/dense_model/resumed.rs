//! A run after one that did not come to its end.

use std::path::Path;

use rankmix::Tensor;
use rankmix::convert::{Progress, convert_dense_model};
use rankmix::formats::{Dtype, ModelWriter, MoeLayout, MoeModel};
use serde_json::Value;

use super::{HIDDEN, NEURONS, config, matrices, options, tensors_of, write_gguf, write_model};

/// All files of an output, the report without what belongs to the run.
fn result(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut bytes = std::fs::read(entry.path()).expect("a file");
            if name == "conversion.json" {
                let mut report: Value = serde_json::from_slice(&bytes).expect("JSON");
                let run = report.as_object_mut().and_then(|keys| keys.remove("run"));
                assert!(run.is_some());
                bytes = report.to_string().into_bytes();
            }
            (name, bytes)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_run_after_one_that_failed_goes_on_and_gives_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let [source, whole, out] = ["in", "whole", "out"].map(|name| folder.path().join(name));
    let layers = 4;
    let mut keys = config();
    keys["num_hidden_layers"] = layers.into();
    let write = |tensors: &[(String, Tensor)]| write_model(&source, tensors, Dtype::F32, &keys);
    write(&tensors_of(layers));
    let options = options(MoeLayout::Mixtral);
    convert_dense_model(&source, &whole, &options, &|_| {}).expect("it converts");

    // A damage of layer 2 that shows neither in the file's size nor in its time.
    let file = source.join("model.safetensors");
    let good = std::fs::read(&file).expect("a file");
    let time = std::fs::metadata(&file)
        .and_then(|facts| facts.modified())
        .expect("a time");
    let put = |bytes: &[u8]| {
        std::fs::write(&file, bytes).expect("it is written");
        let file = std::fs::File::options().write(true).open(&file);
        file.expect("it is there")
            .set_modified(time)
            .expect("a time");
    };
    let mut bad = good.clone();
    let gate = matrices(2)[0].to_f32();
    let gate: Vec<u8> = gate.iter().flat_map(|x| x.to_le_bytes()).collect();
    let place = bad.windows(gate.len()).position(|bytes| bytes == gate);
    let place = place.expect("it is in the file");
    bad[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    put(&bad);
    convert_dense_model(&source, &out, &options, &|_| {}).expect_err("a NaN in layer 2");
    let partial = folder.path().join("out.partial");
    let written = |folder: &Path, layer: usize| {
        let name = ModelWriter::shard_name(layer + 1, 5);
        std::fs::metadata(folder.join(name))
            .and_then(|facts| facts.modified())
            .ok()
    };
    let times: Vec<_> = (0..5).map(|layer| written(&partial, layer)).collect();
    assert_eq!(
        times.iter().map(Option::is_some).collect::<Vec<_>>(),
        [true, true, false, false, false]
    );
    // Of layer 1 something else is there under the name: it is written again.
    std::fs::copy(
        partial.join(ModelWriter::shard_name(1, 5)),
        partial.join(ModelWriter::shard_name(2, 5)),
    )
    .expect("it is copied");

    put(&good);
    let told = std::sync::Mutex::new((Vec::new(), Vec::new()));
    let report = convert_dense_model(&source, &out, &options, &|progress| {
        let mut told = told.lock().expect("no thread has panicked");
        match progress {
            Progress::Notice(text) => told.0.push(text.to_owned()),
            Progress::Written { finished, of } => told.1.push((finished, of)),
            Progress::Layer { .. } => {}
        }
    })
    .expect("it goes on");
    let (notices, finished) = told.into_inner().expect("no thread has panicked");
    assert!(
        notices.len() == 1 && notices[0].contains("going on"),
        "{notices:?}"
    );
    assert_eq!(finished, [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]);
    assert_eq!(
        (report.run.files_written, report.run.files_of_earlier_runs),
        (4, 1)
    );
    assert_eq!(written(&out, 0), times[0], "layer 0 was written again");
    assert!(
        result(&out) == result(&whole),
        "an interrupted conversion gives another result"
    );
}

#[test]
fn a_source_that_was_changed_is_converted_anew_if_that_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = folder.path().join("dense.gguf");
    let mut nan = matrices(1)[1].to_f32();
    nan[0] = f32::NAN;
    let nan = Tensor::f32([NEURONS, HIDDEN], nan).expect("the shape fits");
    write_gguf(&gguf, &[("blk.1.ffn_up.weight".to_owned(), nan)]);
    let out = folder.path().join("out");
    let mut options = options(MoeLayout::Mixtral);
    convert_dense_model(&gguf, &out, &options, &|_| {}).expect_err("a NaN in layer 1");
    // Layer 0 is another now too.
    let other = Tensor::f32([NEURONS, HIDDEN], vec![0.25; NEURONS * HIDDEN]);
    write_gguf(
        &gguf,
        &[(
            "blk.0.ffn_up.weight".to_owned(),
            other.expect("the shape fits"),
        )],
    );
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
    let file = std::fs::File::options().write(true).open(&gguf);
    file.expect("it is there")
        .set_modified(later)
        .expect("a time");
    let error = convert_dense_model(&gguf, &out, &options, &|_| {}).expect_err("another source");
    assert!(error.to_string().contains("another source"), "{error}");
    options.restart = true;
    let report = convert_dense_model(&gguf, &out, &options, &|_| {}).expect("it converts");
    assert_eq!(
        (report.run.files_written, report.run.files_of_earlier_runs),
        (3, 0)
    );
    let model = MoeModel::open(&out).expect("the family reader opens it");
    let up = model.experts(&model.layers()[0]).expect("it is read").up;
    assert!(up.to_f32().iter().all(|&x| x == 0.25));
}
