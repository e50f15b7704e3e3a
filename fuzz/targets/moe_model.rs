//! Any `config.json`, and behind a byte of 0 any names and shapes of tensors of zeros, one to a line (`model.layers.0.mlp.gate.weight 2 4`), as a model
//! that holds mixtures of experts. What opens must be readable.

#![no_main]

mod files;

use libfuzzer_sys::fuzz_target;
use rankmix::formats::MoeModel;

/// What a file of tensors may hold.
const BYTES: usize = 1 << 16;

/// A file of such tensors; none if the lines are no such list, or their data is too large.
fn tensors(lines: &str) -> Option<Vec<u8>> {
    let mut header = "{".to_owned();
    let mut end = 0;
    for line in lines.lines() {
        let mut words = line.split(' ');
        let name = words.next()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        let shape = words.map(|word| word.parse().ok());
        let shape = shape.collect::<Option<Vec<usize>>>()?;
        let bytes = shape
            .iter()
            .try_fold(4usize, |product, n| product.checked_mul(*n))?;
        let start = end;
        end = bytes.checked_add(end).filter(|end| *end <= BYTES)?;
        let comma = if header.len() > 1 { "," } else { "" };
        header += &format!(
            r#"{comma}"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        );
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(std::iter::repeat_n(0, end));
    Some(bytes)
}

fuzz_target!(|bytes: &[u8]| {
    let Some(at) = bytes.iter().position(|byte| *byte == 0) else {
        return;
    };
    let lines = std::str::from_utf8(&bytes[at + 1..]).ok().and_then(tensors);
    let Some(lines) = lines else {
        return;
    };
    files::file("model.safetensors", &lines);
    let config = files::file("config.json", &bytes[..at]);
    let Ok(model) = MoeModel::open(config.parent().expect("a folder of this process")) else {
        return;
    };
    for layer in model.layers() {
        if layer.latent.is_some() {
            model.latent_experts(layer).map(|_| ())
        } else {
            model.experts(layer).map(|_| ())
        }
        .expect("the experts of a layer that was found");
        model.router(layer).expect("a router that was found");
        model.router_bias(layer).expect("a bias that was found");
        model.shared(layer).expect("a shared expert that was found");
        let routing = model.config().routing(layer.experts, layer.router_bias);
        assert!(routing.is_err() || routing.is_ok_and(|routing| routing.top_k <= layer.experts));
    }
});
