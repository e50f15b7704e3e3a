//! Tensors on the host: a shape, an element type, and the elements in row-major order.

use std::fmt;

use crate::error::{Error, Result};

/// The extents of a tensor, outermost first. Every extent is at least 1; a scalar has none.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The extents, outermost first.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// How many dimensions there are; 0 for a scalar.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// How many elements a tensor of this shape has; 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// The innermost extent; 1 for a scalar.
    #[must_use]
    pub fn last(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// The product of all extents but the innermost.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.elements() / self.last().max(1)
    }

    /// The shape that both broadcast to by NumPy's rule, if there is one.
    #[must_use]
    pub fn broadcast(&self, other: &Self) -> Option<Self> {
        let rank = self.rank().max(other.rank());
        let extent = |shape: &Self, axis: usize| {
            (axis + shape.rank())
                .checked_sub(rank)
                .map_or(1, |inner| shape.0[inner])
        };
        (0..rank)
            .map(|axis| match (extent(self, axis), extent(other, axis)) {
                (a, b) if a == b || b == 1 => Some(a),
                (1, b) => Some(b),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .map(Self)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl From<Vec<usize>> for Shape {
    fn from(dims: Vec<usize>) -> Self {
        Self(dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Self(dims.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Self(dims.to_vec())
    }
}

impl From<&Self> for Shape {
    fn from(shape: &Self) -> Self {
        shape.clone()
    }
}

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit floats: what kernels compute in.
    F32,
    /// 64-bit floats: what the reference device gives back. On a graph every float is `F32`, whatever the device computes in.
    F64,
    /// 32-bit signed integers: labels, token ids, chosen experts, permutations.
    I32,
}

impl DType {
    /// The size of one element in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F64 => 8,
        }
    }
}

/// The shape and the element type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The extents.
    pub shape: Shape,
    /// The element type.
    pub dtype: DType,
}

impl TensorType {
    /// A tensor of 32-bit floats.
    pub fn f32(shape: impl Into<Shape>) -> Self {
        Self {
            shape: shape.into(),
            dtype: DType::F32,
        }
    }

    /// A tensor of 32-bit integers.
    pub fn i32(shape: impl Into<Shape>) -> Self {
        Self {
            shape: shape.into(),
            dtype: DType::I32,
        }
    }

    /// The extents, outermost first.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// How many elements there are.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The size of the elements in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = match self.dtype {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::I32 => "i32",
        };
        write!(f, "{dtype}{}", self.shape)
    }
}

/// The elements of a host tensor.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TensorData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 32-bit integers.
    I32(Vec<i32>),
}

/// A tensor on the host, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Shape,
    data: TensorData,
}

impl Tensor {
    /// A tensor of 32-bit floats.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have as many elements as `shape`.
    pub fn f32(shape: impl Into<Shape>, data: Vec<f32>) -> Result<Self> {
        Self::new(shape.into(), TensorData::F32(data))
    }

    /// A tensor of 64-bit floats.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have as many elements as `shape`.
    pub fn f64(shape: impl Into<Shape>, data: Vec<f64>) -> Result<Self> {
        Self::new(shape.into(), TensorData::F64(data))
    }

    /// A tensor of 32-bit integers.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have as many elements as `shape`.
    pub fn i32(shape: impl Into<Shape>, data: Vec<i32>) -> Result<Self> {
        Self::new(shape.into(), TensorData::I32(data))
    }

    /// A tensor whose elements are all 0.
    #[must_use]
    pub fn zeros(ty: &TensorType) -> Self {
        let count = ty.elements();
        let data = match ty.dtype {
            DType::F32 => TensorData::F32(vec![0.0; count]),
            DType::F64 => TensorData::F64(vec![0.0; count]),
            DType::I32 => TensorData::I32(vec![0; count]),
        };
        Self {
            shape: ty.shape.clone(),
            data,
        }
    }

    /// A scalar.
    #[must_use]
    pub fn scalar(value: f32) -> Self {
        Self {
            shape: Shape::default(),
            data: TensorData::F32(vec![value]),
        }
    }

    /// A tensor from its parts.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have as many elements as `shape`.
    pub fn new(shape: Shape, data: TensorData) -> Result<Self> {
        let count = match &data {
            TensorData::F32(data) => data.len(),
            TensorData::F64(data) => data.len(),
            TensorData::I32(data) => data.len(),
        };
        let expected = shape
            .dims()
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent));
        if expected != Some(count) {
            return Err(Error::shape(
                "tensor",
                format!("shape {shape} does not hold {count} elements"),
            ));
        }
        Ok(Self { shape, data })
    }

    /// The extents.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The elements.
    #[must_use]
    pub fn data(&self) -> &TensorData {
        &self.data
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self.data {
            TensorData::F32(_) => DType::F32,
            TensorData::F64(_) => DType::F64,
            TensorData::I32(_) => DType::I32,
        }
    }

    /// Shape and element type together.
    #[must_use]
    pub fn ty(&self) -> TensorType {
        TensorType {
            shape: self.shape.clone(),
            dtype: self.dtype(),
        }
    }

    /// The elements as 32-bit floats, if that is what they are.
    #[must_use]
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let TensorData::F32(data) = &self.data {
            Some(data)
        } else {
            None
        }
    }

    /// The elements as 32-bit integers, if that is what they are.
    #[must_use]
    pub fn as_i32(&self) -> Option<&[i32]> {
        if let TensorData::I32(data) = &self.data {
            Some(data)
        } else {
            None
        }
    }

    /// The elements converted to 32-bit floats.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            TensorData::F32(data) => data.clone(),
            TensorData::F64(data) => data.iter().map(|&x| x as f32).collect(),
            TensorData::I32(data) => data.iter().map(|&x| x as f32).collect(),
        }
    }

    /// The elements converted to 32-bit floats, not copied if that is what they are.
    #[must_use]
    pub fn into_f32(self) -> Vec<f32> {
        match self.data {
            TensorData::F32(data) => data,
            TensorData::F64(_) | TensorData::I32(_) => self.to_f32(),
        }
    }

    /// The elements converted to 64-bit floats.
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            TensorData::F32(data) => data.iter().map(|&x| f64::from(x)).collect(),
            TensorData::F64(data) => data.clone(),
            TensorData::I32(data) => data.iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// The one element of a tensor that has just one, as a float.
    #[must_use]
    pub fn item(&self) -> Option<f64> {
        if self.shape.elements() != 1 {
            return None;
        }
        match &self.data {
            TensorData::F32(data) => data.first().map(|&x| f64::from(x)),
            TensorData::F64(data) => data.first().copied(),
            TensorData::I32(data) => data.first().map(|&x| f64::from(x)),
        }
    }

    /// The position of the first float that is NaN or infinite.
    pub(crate) fn first_not_finite(&self) -> Option<usize> {
        match &self.data {
            TensorData::F32(data) => data.iter().position(|x| !x.is_finite()),
            TensorData::F64(data) => data.iter().position(|x| !x.is_finite()),
            TensorData::I32(_) => None,
        }
    }
}
