//! Files for the targets, in a folder of this process.

use std::path::PathBuf;
use std::sync::OnceLock;

use rankmix::formats::Checkpoint;

/// A file of that name in this process's folder, with these contents. The folder is in memory where the machine has such a file system.
pub fn file(name: &str, contents: &[u8]) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() {
            memory
        } else {
            std::env::temp_dir()
        };
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
