//! Operations: one file each, with the shape rule, the gradient rule, the GPU launches and the CPU reference side by side, and
//! one file of the same name in `shaders/`.

mod accumulate;
mod activation;
mod active_groups;
mod adamw;
mod assign;
mod balance_loss;
mod binary;
mod candidates;
mod capacity;
mod clear;
mod combine;
mod core_gradient;
mod cross_entropy;
mod embedding;
mod expand;
mod expand_pair;
mod gate_gradient;
mod gated_experts;
mod gradient_norm;
mod host;
mod host_chunks;
mod host_gemm;
mod host_sum;
mod loss_scale;
mod matmul;
mod matmul_choice;
mod matmul_kernels;
mod mix_cores;
mod noise;
mod peak;
mod reshape;
mod rms_norm;
mod rotate_cayley;
mod rotate_givens;
mod rotate_householder;
mod rotate_planes;
mod rotate_stages;
mod rotated_gate_gradient;
mod rotated_shrink;
mod rotation;
mod route;
mod route_and_sort;
mod router_metrics;
mod segment_outer;
mod segments;
mod selection_bias;
mod shrink;
mod shrink_choice;
mod silu;
mod soft_merge;
mod softmax;
mod sort;
mod sort_block;
mod spread;
mod subgroup_tile;
mod sum;
mod threefry;
mod turns;
mod unary;
mod work;
mod z_loss;

use std::fmt;

pub use activation::Activation;
pub use active_groups::ActiveGroups;
pub(crate) use active_groups::check_groups;
pub use adamw::AdamWConstants;
pub use balance_loss::{BalanceForm, BalanceLoss};
pub use capacity::DropPolicy;
pub use cross_entropy::IGNORED_LABEL;
pub(crate) use gate_gradient::GatedGradient;
pub use gated_experts::Projection;
pub(crate) use host::HostBuffer;
pub use host::{HostIo, Real};
pub(crate) use host_gemm::{Matrix, gemm};
pub use loss_scale::LossScaling;
pub(crate) use loss_scale::STATE_LENGTH;
pub use matmul::{MatMul, Product};
pub use mix_cores::CoreMix;
pub(crate) use noise::check_dropout;
pub use peak::{CopyForm, MultiplyAdds};
pub use rotation::Rotation;
pub use route::{Route, Routed, Score};
pub use router_metrics::RouterMetrics;
pub use segments::{Layout, Segments};
pub use sort::Sorted;
pub(crate) use spread::{element_wise, row_workgroup};
pub use threefry::threefry;
pub use work::Work;

use crate::device::{Capabilities, Launches};
use crate::error::{Error, Result};
use crate::graph::Backward;
use crate::tensor::{DType, Tensor, TensorType};

/// The types of an operation's inputs and outputs, for [`Op::launches`].
#[derive(Clone, Copy, Debug)]
pub struct LaunchTypes<'a> {
    /// The inputs, in order.
    pub inputs: &'a [TensorType],
    /// The outputs, in order.
    pub outputs: &'a [TensorType],
}

/// Kernels that do the same work of one operation at one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The operation and what the choice depends on: the sizes, as in `matmul nt 512 x 1024 x 1024`, and where something is stored in 16
    /// bits, in what each operand and result is: `matmul nt 512 x 1024 x 1024 from f32, f16 to f16`.
    pub key: String,
    /// The names of the kernels, that of the operation's own rule first.
    pub kernels: Vec<&'static str>,
}

/// An output that lives in the memory of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The input's number.
    pub input: usize,
    /// The output's number.
    pub output: usize,
    /// What that means.
    pub kind: AliasKind,
}

/// How an output shares an input's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AliasKind {
    /// The output is the input under another shape: nothing is launched.
    View,
    /// The kernel reads and writes the output, which arrives holding the input's elements and must not be bound as an input.
    /// Where the input is needed afterwards, the planner copies it first.
    Accumulate,
    /// As `Accumulate`, but the input is a parameter, which is changed in place and stays changed after the run.
    Update,
}

/// The allowed values of an integer input that comes from outside the graph; checked when the host writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexRange {
    /// The input's number.
    pub input: usize,
    /// One past the largest index.
    pub limit: usize,
    /// A value outside `0..limit` that is allowed all the same.
    pub ignored: Option<i32>,
}

/// An operation of the graph. The trait is public: an application can add operations of its own, with their own WGSL, by
/// [`Graph::apply`](crate::Graph::apply).
///
/// An op that launches kernels promises that they stay inside the buffers they bind, for every shape that
/// [`Op::outputs`] accepts: trusted devices run them without bounds checks.
///
/// Where a value is stored in 16 bits (see [`Precision`](crate::Precision)) the kernels' text is rewritten to read and write it so. That
/// needs each float binding declared on one line, `@group(0) @binding(N) var<storage, read> name: array<f32>;` (or `read_write`;
/// `vec2<f32>`, `vec4<f32>`), touched only as `name[index]`, and written only by statements `name[index] = value;` or with `+=`, `-=`,
/// `*=`, `/=` on one line. A kernel that does not keep to that is an error when a session is compiled. Floats must not be read as integers: a read-only binding
/// declared as `array<u32>` or `array<i32>` is left as it is.
pub trait Op: fmt::Debug + Send + Sync + 'static {
    /// The name in messages and tables.
    fn name(&self) -> &'static str;

    /// The least that it has to compute and to move, for operands that [`Op::outputs`] accepts. As long as an operation does not say
    /// more: every operand read once and every result written once, views not at all.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operands do not fit the operation.
    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        Ok(Work::moving_in(self, io))
    }

    /// Shape and type rule; the only place that checks the operands.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operands do not fit the operation.
    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>>;

    /// Builds the gradient of every input that [`Backward::wants`] from the gradients of the outputs.
    ///
    /// # Errors
    /// [`Error::NoGradient`] if there is no rule.
    fn backward(&self, _context: &mut Backward<'_>) -> Result<()> {
        Err(Error::NoGradient { op: self.name() })
    }

    /// Whether a gradient can flow to this float input at all.
    fn differentiable(&self, _input: usize) -> bool {
        true
    }

    /// Whether this float output stays in f32 where the graph's precision stores values in 16 bits: for sums over many elements,
    /// losses, probabilities.
    fn keeps_f32(&self, _output: usize) -> bool {
        false
    }

    /// Outputs that share the memory of inputs.
    fn aliases(&self) -> Vec<Alias> {
        Vec::new()
    }

    /// Integer inputs whose values must lie in a range.
    fn index_ranges(&self, _inputs: &[TensorType]) -> Vec<IndexRange> {
        Vec::new()
    }

    /// The kernels that could do this work, if there are several: [`Op::launches`] takes the one that
    /// [`Capabilities::kernels`] names for the key, and the first if it names none of them.
    ///
    /// # Errors
    /// As [`Op::launches`].
    fn choice(&self, _io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Option<Choice>> {
        Ok(None)
    }

    /// What [`Device::tune`](crate::Device::tune) measures the kernels of [`Op::choice`] on: a tensor for each integer input, in their order,
    /// that is work like the real. Without (the default), an operation that reads integers is left to its own rule.
    ///
    /// # Errors
    /// As [`Op::outputs`].
    fn sample_integers(&self, _inputs: &[TensorType]) -> Result<Option<Vec<Tensor>>> {
        Ok(None)
    }

    /// The kernels to run on a GPU, as data.
    ///
    /// # Errors
    /// [`Error::Limit`] if the shapes are more than the device can do.
    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches>;

    /// The same on the CPU, in 32-bit floats. Written once with [`host_reference!`](crate::host_reference).
    ///
    /// # Errors
    /// [`Error::Shape`] if an operand is not there or of the wrong type.
    fn reference_f32(&self, io: HostIo<'_, f32>) -> Result<()>;

    /// The same on the CPU, in 64-bit floats.
    ///
    /// # Errors
    /// As [`Op::reference_f32`].
    fn reference_f64(&self, io: HostIo<'_, f64>) -> Result<()>;
}

/// Inside `impl Op for ...`: both reference methods, from one generic method `fn reference<R: Real>(&self, io: HostIo<'_, R>)`.
#[macro_export]
macro_rules! host_reference {
    () => {
        fn reference_f32(&self, io: $crate::HostIo<'_, f32>) -> $crate::Result<()> {
            self.reference(io)
        }

        fn reference_f64(&self, io: $crate::HostIo<'_, f64>) -> $crate::Result<()> {
            self.reference(io)
        }
    };
}

/// The shader of an operation, from `shaders/NAME.wgsl`; further names are put in front of it as shared parts.
macro_rules! shader {
    ($name:literal $(, $part:literal)*) => {
        $crate::device::Shader {
            name: $name,
            source: concat!($(include_str!(concat!("../../shaders/parts/", $part, ".wgsl")),)* include_str!(concat!("../../shaders/", $name, ".wgsl"))),
        }
    };
}
pub(crate) use shader;

/// The invocations of a workgroup that reduces a whole tensor by itself.
pub(crate) const TOTAL_WORKGROUP: u32 = 256;

/// How many operands an operation takes.
pub(crate) fn expect_count(op: &'static str, inputs: &[TensorType], count: usize) -> Result<()> {
    if inputs.len() == count {
        Ok(())
    } else {
        Err(Error::shape(
            op,
            format!("takes {count} operands, was given {}", inputs.len()),
        ))
    }
}

/// That an operand has this element type.
pub(crate) fn expect_dtype(
    op: &'static str,
    name: &str,
    ty: &TensorType,
    dtype: DType,
) -> Result<()> {
    if ty.dtype == dtype {
        Ok(())
    } else {
        Err(Error::shape(
            op,
            format!("{name} is {ty}, expected elements of type {dtype:?}"),
        ))
    }
}

/// That an operand is floats of this shape.
pub(crate) fn expect_f32(
    op: &'static str,
    name: &str,
    ty: &TensorType,
    dims: &[usize],
) -> Result<()> {
    if ty.dtype == DType::F32 && ty.dims() == dims {
        Ok(())
    } else {
        Err(Error::shape(
            op,
            format!("{name} is {ty}, expected f32{dims:?}"),
        ))
    }
}

/// That an operand is integers of this shape.
pub(crate) fn expect_i32(
    op: &'static str,
    name: &str,
    ty: &TensorType,
    dims: &[usize],
) -> Result<()> {
    if ty.dtype == DType::I32 && ty.dims() == dims {
        Ok(())
    } else {
        Err(Error::shape(
            op,
            format!("{name} is {ty}, expected i32{dims:?}"),
        ))
    }
}

/// The extents of an operand that must be floats with so many dimensions.
pub(crate) fn dims_f32<const N: usize>(
    op: &'static str,
    name: &str,
    ty: &TensorType,
) -> Result<[usize; N]> {
    match <[usize; N]>::try_from(ty.dims()) {
        Ok(dims) if ty.dtype == DType::F32 => Ok(dims),
        _ => Err(Error::shape(
            op,
            format!("{name} is {ty}, expected f32 with {N} dimensions"),
        )),
    }
}
