//! Any bytes as a GGUF file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rankmix::formats::GgufFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = GgufFile::parse(bytes.to_vec(), "fuzzed.gguf") else {
        return;
    };
    for (name, tensor) in file.tensors() {
        if let Ok(raw) = file.raw(name) {
            assert_eq!(raw.len(), tensor.bytes());
        }
        _ = file.tensor(name);
    }
    _ = file.lora();
});
