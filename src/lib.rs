//! Trainable mixtures of low-rank experts on any GPU.
//!
//! rankmix is a set of hand-written WGSL kernels for mixtures of low-rank experts (LoRA, MoE-LoRA, RotMoLE, CoMoL, MoE and latent MoE),
//! and the smallest runtime that can train with them: tensors, a static graph with hand-coded gradients, an executor on wgpu (Vulkan, Metal, DX12, GL, browsers), and one on the
//! CPU for machines without a GPU. It shares the wgpu device of an application that has one.
//!
//! ```
//! use rankmix::layers::{AdapterOptions, Linear, RotMole, Routing};
//! use rankmix::train::AdamW;
//! use rankmix::{Device, Graph, ParameterStore, Tensor, TensorType};
//!
//! # fn main() -> rankmix::Result<()> {
//! // What to compute: a frozen linear layer under a mixture of 4 rotated LoRA experts of rank 8, 2 of them for each token.
//! let mut graph = Graph::new();
//! let x = graph.input("x", TensorType::f32([16, 64]))?;
//! let labels = graph.input("labels", TensorType::i32([16]))?;
//! let layer = RotMole::new(Linear::new("proj", 64, 32), AdapterOptions::new(8, 16.0), Routing::new(4, 2))?;
//! let routed = layer.forward(&mut graph, x)?;
//! let task = graph.cross_entropy(routed.output, labels)?;
//! let balance = routed.auxiliary_loss(&mut graph, 0.01, 0.001)?;
//! let loss = graph.add(task, balance)?;
//! graph.output(task)?;
//!
//! // The backward pass and the optimiser step are part of the same graph.
//! let gradients = graph.backward(loss)?;
//! let mut optimizer = AdamW::default().add_to(&mut graph, &gradients)?;
//!
//! // Where: `Device::open()` takes the best GPU, or the CPU. Parameters live there, by name.
//! let device = Device::cpu();
//! let store = ParameterStore::new(&device);
//! store.initialize(&graph, 42)?;
//! let mut session = graph.compile(&store)?;
//! session.set("x", &Tensor::f32([16, 64], (0..1024).map(|i| (i as f32).sin()).collect())?)?;
//! session.set("labels", &Tensor::i32([16], (0..16).collect())?)?;
//!
//! // A step is one submission; only what is asked for is read back.
//! let mut losses = Vec::new();
//! for _ in 0..20 {
//!     optimizer.prepare(&mut session, 0.01)?;
//!     losses.push(session.run_reading(&[task])?[0].to_f32()[0]);
//! }
//! assert!(losses[19] < losses[0]);
//! # Ok(())
//! # }
//! ```
//!
//! # Promises
//!
//! * Two runs on one adapter are equal bit for bit: no float atomics, every sum in a fixed order.
//! * After its first run a session allocates and compiles nothing; what uploads stage is wgpu's own.
//! * A user's mistake, a damaged file, a lost device, a full GPU are typed [`Error`]s that name the thing, its size and the limit.
//!
//! # In a browser
//!
//! On `wasm32-unknown-unknown` the device is the browser's WebGPU, or the CPU executor. Nothing may wait there: a call that would is
//! [`Error::WouldBlock`], and has a form to await, natively too: [`Device::open_async`], [`ParameterStore::initialize_async`],
//! [`Graph::compile_async`], [`Session::run_reading_async`], [`Session::read_async`] and so on. The browser reports its errors later, and what
//! is awaited next returns them, typed as everywhere.
//!
//! ```
//! # use rankmix::{Device, DeviceOptions, Graph, ParameterStore, Session, Tensor, Value};
//! # use rankmix::graph::SessionOptions;
//! async fn first_run(graph: &Graph, x: Value, y: Value, input: &Tensor) -> rankmix::Result<Tensor> {
//!     let device = Device::open_async(&DeviceOptions::default()).await?;
//!     let store = ParameterStore::new(&device);
//!     store.initialize_async(graph, 42).await?;
//!     let mut session = graph.compile_async(&store, SessionOptions::default()).await?;
//!     session.write(x, input)?;
//!     Ok(session.run_reading_async(&[y]).await?.remove(0))
//! }
//! ```
//!
//! Natively an application that awaits must poll the wgpu device, as it does for its own work.
//!
//! # Where things are
//!
//! [`layers`] and [`train`] are made of [`graph`] operations, which are in [`ops`], one file each, and describe their kernels as data to
//! [`device`], the only module that names wgpu. `docs/architecture.md` in the repository says more.

#[cfg(feature = "convert")]
pub mod convert;
#[cfg_attr(
    target_arch = "wasm32",
    expect(
        clippy::arc_with_non_send_sync,
        reason = "threads share these everywhere but in a browser, which has one"
    )
)]
pub mod device;
mod error;
mod file;
pub mod formats;
pub mod golden;
pub mod graph;
pub mod layers;
pub mod ops;
mod tensor;
pub mod train;

pub use device::{Device, DeviceOptions};
pub use error::{Error, Result};
pub use graph::{Graph, Init, ParameterStore, Precision, Session, Storage, Value};
pub use ops::{HostIo, Op, Real};
pub use tensor::{DType, Shape, Tensor, TensorData, TensorType};
pub use wgpu;

/// The README's example, compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
