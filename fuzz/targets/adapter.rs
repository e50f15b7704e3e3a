//! Any bytes as the `adapter_config.json` of an adapter of any kind, beside the tensors of a mixture of two experts of rank 1 on a layer of 2 by 2.

#![no_main]

mod files;

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use rankmix::formats::Adapter;

/// A file with these matrices, all of ones, and our format's metadata.
fn tensors(matrices: &[(&str, [usize; 2])]) -> Vec<u8> {
    let mut header = r#"{"__metadata__":{"format":"rankmix","format_version":"1"}"#.to_owned();
    let mut end = 0;
    for (name, [rows, columns]) in matrices {
        let start = end;
        end += 4 * rows * columns;
        header += &format!(
            r#","base_model.model.layer.{name}.weight":{{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[{start},{end}]}}"#
        );
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(std::iter::repeat_n(1f32.to_le_bytes(), end / 4).flatten());
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    static TENSORS: Once = Once::new();
    TENSORS.call_once(|| {
        let matrices = [
            ("experts.0.lora_A", [1, 2]),
            ("experts.0.lora_B", [2, 1]),
            ("experts.1.lora_A", [1, 2]),
            ("experts.1.lora_B", [2, 1]),
            ("moe_gate", [2, 2]),
        ];
        files::file("adapter_model.safetensors", &tensors(&matrices));
    });
    let config = files::file("adapter_config.json", bytes);
    let folder = config.parent().expect("a folder of this process");
    if let Ok(Adapter::Mixture(mixture)) = Adapter::read(folder) {
        mixture.check().expect("what was read is sound");
    }
});
