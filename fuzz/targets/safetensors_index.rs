//! Any bytes as a model's index beside two sound files, of tensors `a` and `b`.

#![no_main]

mod files;

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use rankmix::formats::Checkpoint;

/// A file of one tensor with two numbers.
fn shard(tensor: &str) -> Vec<u8> {
    let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 8]);
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    static SHARDS: Once = Once::new();
    SHARDS.call_once(|| {
        files::file("a.safetensors", &shard("a"));
        files::file("b.safetensors", &shard("b"));
    });
    let path = files::file("model.safetensors.index.json", bytes);
    if let Ok(checkpoint) = Checkpoint::open(&path) {
        assert!(
            checkpoint
                .files()
                .all(|file| file.parent() == path.parent())
        );
        files::read_all(&checkpoint);
    }
});
