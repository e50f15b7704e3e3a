//! Files: tensors, parameters and models in safetensors, adapters of PEFT, models and adapters in GGUF.

mod adapter;
mod checkpoint;
mod file_bytes;
mod gguf;
mod mixture;
mod model_writer;
mod moe;
mod peft;
mod safetensors;

pub use self::adapter::Adapter;
pub use self::checkpoint::{Checkpoint, TensorEntry};
pub use self::gguf::{GgufFile, GgufLora, GgufTensor, GgufType, GgufValue, GgufWriter};
pub use self::mixture::{MixtureAdapter, MixtureKind, MixtureLayer, MoePeftAdapter};
#[cfg(feature = "convert")]
pub(crate) use self::model_writer::write_json;
pub use self::model_writer::{ModelWriter, OutputTensor};
#[cfg(feature = "convert")]
pub(crate) use self::moe::{LATENT_KEY, expert_shapes, latent_parts};
pub use self::moe::{
    LATENT_LAYOUT_VERSION, LatentConfig, LatentDown, LatentExperts, LatentLayer, MoeConfig,
    MoeExperts, MoeLayer, MoeLayout, MoeModel, NamedMatrix, SharedMatrices,
};
pub use self::peft::{ExpertOrientation, FusedExperts, LoraConfig, LoraPair, PeftAdapter, Target};
#[cfg(feature = "convert")]
pub(crate) use self::peft::{PREFIX as PEFT_PREFIX, folder::CONFIG as ADAPTER_CONFIG};
pub use self::safetensors::TensorFile;
pub(crate) use self::safetensors::read_bytes;
pub use ::safetensors::Dtype;
