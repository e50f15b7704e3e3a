//! Any text as the `adapter_config.json` of a LoRA adapter; what is taken is written and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rankmix::formats::LoraConfig;

const LAYERS: [&str; 2] = ["model.layers.0.self_attn.q_proj", "model.embed_tokens"];

fuzz_target!(|json: &str| {
    let Ok(config) = LoraConfig::from_json(json, "adapter_config.json") else {
        return;
    };
    _ = config.unknown_keys();
    for layer in LAYERS {
        _ = (
            config.rank_of(layer),
            config.alpha_of(layer),
            config.scale_of(layer),
        );
    }
    let again = LoraConfig::from_json(&config.to_json(), "adapter_config.json")
        .expect("what was written must be read");
    assert_eq!(again.to_json(), config.to_json());
});
