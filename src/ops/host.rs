//! What the CPU reference of an operation sees: slices of floats (f32 or f64) and of integers.

use std::iter::Sum;

use bytemuck::Pod;

use crate::error::{Error, Result};
use crate::ops::Op;
use crate::ops::host_sum::sum_of;
use crate::tensor::{DType, TensorType};

/// The float types that the reference is written for.
pub trait Real: num_traits::Float + num_traits::NumAssign + Pod + Send + Sync + Sum {
    /// From a constant.
    fn of(value: f64) -> Self;
    /// To 64 bits.
    fn f64(self) -> f64;
    /// The reference of an operation in this type.
    ///
    /// # Errors
    /// What the reference returns.
    fn run(op: &dyn Op, io: HostIo<'_, Self>) -> Result<()>;
}

impl Real for f32 {
    fn of(value: f64) -> Self {
        value as Self
    }
    fn f64(self) -> f64 {
        f64::from(self)
    }
    fn run(op: &dyn Op, io: HostIo<'_, Self>) -> Result<()> {
        op.reference_f32(io)
    }
}

impl Real for f64 {
    fn of(value: f64) -> Self {
        value
    }
    fn f64(self) -> f64 {
        self
    }
    fn run(op: &dyn Op, io: HostIo<'_, Self>) -> Result<()> {
        op.reference_f64(io)
    }
}

/// The maximum of a row, and the sum of the exponentials of its elements less the maximum.
pub(crate) fn max_and_sum<R: Real>(row: &[R]) -> (R, R) {
    let max = row.iter().copied().fold(R::neg_infinity(), R::max);
    (max, sum_of([row], |[x]| (x - max).exp()))
}

/// Host memory of one value: 64-bit words, so that it can hold elements of any type.
pub(crate) type HostBuffer = Vec<u64>;

/// The inputs and outputs of an operation on the host. An output that is written over an input (see
/// [`Op::aliases`](super::Op::aliases)) arrives holding that input's elements; the input itself must then not be read.
#[derive(Debug)]
pub struct HostIo<'a, R> {
    inputs: Vec<Option<(&'a [u64], &'a TensorType)>>,
    outputs: Vec<Option<(&'a mut [u64], &'a TensorType)>>,
    element: std::marker::PhantomData<R>,
}

impl<'a, R: Real> HostIo<'a, R> {
    pub(crate) fn new(
        inputs: Vec<Option<(&'a [u64], &'a TensorType)>>,
        outputs: Vec<Option<(&'a mut [u64], &'a TensorType)>>,
    ) -> Self {
        Self {
            inputs,
            outputs,
            element: std::marker::PhantomData,
        }
    }

    fn input(&self, index: usize) -> Result<(&'a [u64], &'a TensorType)> {
        self.inputs.get(index).copied().flatten().ok_or_else(|| {
            Error::shape(
                "reference",
                format!("input {index} does not exist or is being overwritten"),
            )
        })
    }

    fn output(&mut self, index: usize) -> Result<(&'a mut [u64], &'a TensorType)> {
        self.outputs
            .get_mut(index)
            .and_then(Option::take)
            .ok_or_else(|| {
                Error::shape(
                    "reference",
                    format!("output {index} does not exist or was taken before"),
                )
            })
    }

    /// The shape and type of an input.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such input.
    pub fn input_type(&self, index: usize) -> Result<&'a TensorType> {
        Ok(self.input(index)?.1)
    }

    /// The elements of a float input.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such input or its elements are integers.
    pub fn floats(&self, index: usize) -> Result<&'a [R]> {
        let (words, ty) = self.input(index)?;
        if ty.dtype == DType::I32 {
            return Err(Error::shape(
                "reference",
                format!("input {index} holds integers"),
            ));
        }
        Ok(&bytemuck::cast_slice(words)[..ty.elements()])
    }

    /// The elements of an integer input.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such input or its elements are floats.
    pub fn ints(&self, index: usize) -> Result<&'a [i32]> {
        let (words, ty) = self.input(index)?;
        if ty.dtype != DType::I32 {
            return Err(Error::shape(
                "reference",
                format!("input {index} holds floats"),
            ));
        }
        Ok(&bytemuck::cast_slice(words)[..ty.elements()])
    }

    /// The elements of a float output, to be written. Each output can be taken once.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such output or its elements are integers.
    pub fn floats_out(&mut self, index: usize) -> Result<&'a mut [R]> {
        let (words, ty) = self.output(index)?;
        if ty.dtype == DType::I32 {
            return Err(Error::shape(
                "reference",
                format!("output {index} holds integers"),
            ));
        }
        Ok(&mut bytemuck::cast_slice_mut(words)[..ty.elements()])
    }

    /// The elements of an integer output, to be written. Each output can be taken once.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such output or its elements are floats.
    pub fn ints_out(&mut self, index: usize) -> Result<&'a mut [i32]> {
        let (words, ty) = self.output(index)?;
        if ty.dtype != DType::I32 {
            return Err(Error::shape(
                "reference",
                format!("output {index} holds floats"),
            ));
        }
        Ok(&mut bytemuck::cast_slice_mut(words)[..ty.elements()])
    }
}
