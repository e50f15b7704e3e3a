//! Files: tensors and parameters in safetensors.

mod safetensors;

pub use self::safetensors::TensorFile;
