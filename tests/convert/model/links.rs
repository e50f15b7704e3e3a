//! Models whose folders hold links, as those in caches of models do.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use rankmix::Result;
use rankmix::convert::{LatentOptions, ModelOptions, convert_model};
use rankmix::formats::Dtype;

use super::written::Family;

#[test]
fn links_to_files_are_followed_and_links_to_folders_are_not() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = |name: &str| folder.path().join(name);
    let source = at("in");
    Family::Olmoe.model(2, Dtype::F32).write(&source, 1);
    // The model's files are links to elsewhere, whose names say nothing.
    fs::create_dir(at("blobs")).expect("a folder");
    for (number, name) in ["model.safetensors", "config.json", "tokenizer.json"]
        .iter()
        .enumerate()
    {
        let blob = at("blobs").join(number.to_string());
        fs::rename(source.join(name), &blob).expect("a file of the model");
        symlink(&blob, source.join(name)).expect("a link");
    }
    // Back to where it is, to what is none of the model's, and to nothing.
    symlink("..", source.join("more/back")).expect("a link");
    symlink(at("blobs"), source.join("others")).expect("a link");
    symlink(at("absent"), source.join("dangling.txt")).expect("a link");
    let _listener = UnixListener::bind(source.join("socket")).expect("a short path");
    let options = ModelOptions::new(LatentOptions::new(2, 5));
    let report = convert_model(&source, &at("out"), &options, &|_| {})?;
    let left = [
        "dangling.txt (a link to nothing)",
        "more/back (a link to a folder)",
        "others (a link to a folder)",
        "socket (no file)",
    ];
    assert_eq!(report.not_copied, left);
    let warned = |name: &&str| report.warnings.iter().any(|text| text.contains(*name));
    assert!(left.iter().all(warned), "{:?}", report.warnings);
    let copied = at("out/tokenizer.json");
    let kind = fs::symlink_metadata(&copied).expect("a file");
    assert!(kind.is_file());
    assert_eq!(
        fs::read(&copied).expect("a file"),
        fs::read(at("blobs/2")).expect("a file")
    );
    assert!(at("out/more/notes.txt").exists());
    for name in ["out/more/back", "out/others", "out/dangling.txt"] {
        assert!(fs::symlink_metadata(at(name)).is_err(), "{name}");
    }
    let text = fs::read_to_string(at("out/conversion.json")).expect("the report");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["source"]["files"][0]["name"], "model.safetensors");
    Ok(())
}

#[test]
fn a_link_to_nothing_is_no_name_for_an_output() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let at = |name: &str| folder.path().join(name);
    Family::Olmoe.model(1, Dtype::F32).write(&at("in"), 1);
    symlink(at("absent"), at("out")).expect("a link");
    let mut options = ModelOptions::new(LatentOptions::new(2, 5));
    for overwrite in [false, true] {
        options.overwrite = overwrite;
        let error = convert_model(&at("in"), &at("out"), &options, &|_| {});
        let error = error.expect_err("a link to nothing").to_string();
        assert!(error.contains("out: ") && error.contains("link"), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 2);
}
