//! Any bytes as a safetensors file.

#![no_main]

mod files;

use libfuzzer_sys::fuzz_target;
use rankmix::formats::{Checkpoint, TensorFile};

fuzz_target!(|bytes: &[u8]| {
    let path = files::file("model.safetensors", bytes);
    let opened = Checkpoint::open(&path);
    let parsed = TensorFile::parse(bytes, &path);
    match opened {
        Ok(checkpoint) => files::read_all(&checkpoint),
        Err(_) => assert!(parsed.is_err(), "one reader takes what the other refuses"),
    }
});
