//! Files: tensors, parameters and models in safetensors, adapters of PEFT, models and adapters in GGUF.

mod adapter;
mod checkpoint;
mod file_bytes;
mod gguf;
mod mixture;
mod moe;
mod peft;
mod safetensors;

pub use self::adapter::Adapter;
pub use self::checkpoint::{Checkpoint, TensorEntry};
pub use self::gguf::{GgufFile, GgufLora, GgufTensor, GgufType, GgufValue, GgufWriter};
pub use self::mixture::{MixtureAdapter, MixtureKind, MixtureLayer, MoePeftAdapter};
pub use self::moe::{LatentDown, LatentExperts, MoeExperts};
pub use self::peft::{ExpertOrientation, FusedExperts, LoraConfig, LoraPair, PeftAdapter, Target};
pub use self::safetensors::TensorFile;
pub(crate) use self::safetensors::read_bytes;
pub use ::safetensors::Dtype;
