//! rankmix

pub mod device;
mod error;
pub mod graph;
pub mod ops;
mod tensor;

pub use device::{Device, DeviceOptions};
pub use error::{Error, Result};
pub use graph::{Graph, Init, ParameterStore, Session, Value};
pub use ops::{HostIo, Op, Real};
pub use tensor::{DType, Shape, Tensor, TensorData, TensorType};
pub use wgpu;
