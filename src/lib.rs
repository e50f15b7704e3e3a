//! rankmix

pub mod device;
mod error;
pub mod formats;
pub mod golden;
pub mod graph;
pub mod layers;
pub mod ops;
mod tensor;
pub mod train;

pub use device::{Device, DeviceOptions};
pub use error::{Error, Result};
pub use graph::{Graph, Init, ParameterStore, Session, Value};
pub use ops::{HostIo, Op, Real};
pub use tensor::{DType, Shape, Tensor, TensorData, TensorType};
pub use wgpu;
