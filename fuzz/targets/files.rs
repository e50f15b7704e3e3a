//! Files for the targets, in a folder of this process.

use std::path::PathBuf;
use std::sync::OnceLock;

use rankmix::formats::Checkpoint;

/// A file of that name, with these contents, in a folder of this process below the one that `RANKMIX_FUZZ_FILES` names, or below that of temporary files.
pub fn file(name: &str, contents: &[u8]) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let parent = std::env::var_os("RANKMIX_FUZZ_FILES").map(PathBuf::from);
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        let folder = parent.join(format!("rankmix-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the files");
        folder
    });
    let path = folder.join(name);
    // A new file: an old one that is still mapped must not change under its reader.
    _ = std::fs::remove_file(&path);
    std::fs::write(&path, contents).expect("a file to write to");
    path
}

/// Reads all there is to read; only that it comes back matters.
pub fn read_all(checkpoint: &Checkpoint) {
    for (name, entry) in checkpoint.tensors() {
        let raw = checkpoint.raw(name).expect("a tensor that is listed");
        assert_eq!(raw.len(), entry.bytes());
        _ = checkpoint.tensor(name);
    }
}
