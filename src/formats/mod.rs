//! Files: tensors and parameters in safetensors.

mod safetensors;

pub use self::safetensors::TensorFile;
pub(crate) use self::safetensors::read_bytes;
