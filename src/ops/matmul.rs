//! Matrix products, in all transposes, batched, and added into a tensor that is already there.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype, expect_f32,
    shader,
};
use crate::tensor::{DType, TensorType};

/// Rows and columns of the result that one invocation computes, as in `shaders/matmul.wgsl`.
const TILE: usize = 8;
/// Fewer workgroups than this leave a processor idle: smaller ones are made.
const ENOUGH_GROUPS: usize = 32;

/// Which operands of a matrix product are transposed, and the factor in front of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatMul {
    /// The left operand is stored as `[k, m]`.
    pub transpose_a: bool,
    /// The right operand is stored as `[n, k]`, as the weights of linear layers are.
    pub transpose_b: bool,
    /// The factor.
    pub alpha: f32,
}

impl Default for MatMul {
    fn default() -> Self {
        Self {
            transpose_a: false,
            transpose_b: false,
            alpha: 1.0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct MatMulOp {
    options: MatMul,
    accumulate: bool,
}

/// The sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    a_batched: bool,
    b_batched: bool,
}

impl Graph {
    /// `a b`: `[m, k]` times `[k, n]`. Either may have a batch dimension in front; one without is repeated.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul(&mut self, a: Value, b: Value) -> Result<Value> {
        self.matmul_with(a, b, MatMul::default(), None)
    }

    /// `a bᵀ`: `[m, k]` times `[n, k]`: a linear layer with its weight stored as `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul_nt(&mut self, a: Value, b: Value) -> Result<Value> {
        self.matmul_with(
            a,
            b,
            MatMul {
                transpose_b: true,
                ..MatMul::default()
            },
            None,
        )
    }

    /// `base + alpha op(a) op(b)`; the result takes over the memory of `base` where `base` is not used again.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul_with(
        &mut self,
        a: Value,
        b: Value,
        options: MatMul,
        base: Option<Value>,
    ) -> Result<Value> {
        let op = MatMulOp {
            options,
            accumulate: base.is_some(),
        };
        match base {
            Some(base) => self.apply1(op, &[a, b, base]),
            None => self.apply1(op, &[a, b]),
        }
    }
}

impl MatMulOp {
    fn sizes(&self, a: &TensorType, b: &TensorType) -> Result<Sizes> {
        let wrong = || {
            let marks = [self.options.transpose_a, self.options.transpose_b]
                .map(|t| if t { "ᵀ" } else { "" });
            Error::shape(
                "matmul",
                format!("{a}{} times {b}{} do not fit", marks[0], marks[1]),
            )
        };
        let split = |ty: &TensorType| match *ty.dims() {
            [rows, columns] => Ok((None, rows, columns)),
            [batch, rows, columns] => Ok((Some(batch), rows, columns)),
            _ => Err(wrong()),
        };
        let (a_batch, a_rows, a_columns) = split(a)?;
        let (b_batch, b_rows, b_columns) = split(b)?;
        let (m, k) = if self.options.transpose_a {
            (a_columns, a_rows)
        } else {
            (a_rows, a_columns)
        };
        let (b_k, n) = if self.options.transpose_b {
            (b_columns, b_rows)
        } else {
            (b_rows, b_columns)
        };
        let batches_fit = a_batch.is_none() || b_batch.is_none() || a_batch == b_batch;
        if k != b_k || !batches_fit {
            return Err(wrong());
        }
        let batch = a_batch.or(b_batch).unwrap_or(1);
        Ok(Sizes {
            batch,
            m,
            n,
            k,
            a_batched: a_batch.is_some(),
            b_batched: b_batch.is_some(),
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let sizes = self.sizes(io.input_type(0)?, io.input_type(1)?)?;
        let Sizes { batch, m, n, k, .. } = sizes;
        let (a, b) = (io.floats(0)?, io.floats(1)?);
        let out = io.floats_out(0)?;
        for index in 0..batch {
            let at = |batched: bool, size: usize| if batched { index * size } else { 0 };
            let (a, b) = (
                &a[at(sizes.a_batched, m * k)..],
                &b[at(sizes.b_batched, k * n)..],
            );
            let (ta, tb) = (self.options.transpose_a, self.options.transpose_b);
            let left = if ta {
                Matrix::new(a, k, m)
            } else {
                Matrix::new(a, m, k)
            };
            let right = if tb {
                Matrix::new(b, n, k)
            } else {
                Matrix::new(b, k, n)
            };
            let alpha = R::of(f64::from(self.options.alpha));
            let out = &mut out[index * m * n..(index + 1) * m * n];
            gemm(
                out,
                left.transposed_if(ta),
                right.transposed_if(tb),
                alpha,
                self.accumulate,
                true,
            );
        }
        Ok(())
    }
}

impl Op for MatMulOp {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes { batch, m, n, k, .. } = self.sizes(&io.inputs[0], &io.inputs[1])?;
        Ok(Work::moving(io).with_flops(2 * batch * m * n * k))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let count = if self.accumulate { 3 } else { 2 };
        expect_count(self.name(), inputs, count)?;
        expect_dtype(self.name(), "the left operand", &inputs[0], DType::F32)?;
        expect_dtype(self.name(), "the right operand", &inputs[1], DType::F32)?;
        let Sizes {
            batch,
            m,
            n,
            a_batched,
            b_batched,
            ..
        } = self.sizes(&inputs[0], &inputs[1])?;
        let dims = if a_batched || b_batched {
            vec![batch, m, n]
        } else {
            vec![m, n]
        };
        if self.accumulate {
            expect_f32(self.name(), "the tensor added into", &inputs[2], &dims)?;
        }
        Ok(vec![TensorType::f32(dims)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dc) = context.gradient(0) else {
            return Ok(());
        };
        let (a, b) = (context.input(0), context.input(1));
        let MatMul {
            transpose_a,
            transpose_b,
            alpha,
        } = self.options;
        // C = alpha op(A) op(B): dA is dC op(B)^T, dB is op(A)^T dC, each transposed as its operand is.
        let of_a = if transpose_a {
            (b, dc, transpose_b, true)
        } else {
            (dc, b, false, !transpose_b)
        };
        let of_b = if transpose_b {
            (dc, a, true, transpose_a)
        } else {
            (a, dc, !transpose_a, false)
        };
        for (input, operand, (left, right, transpose_a, transpose_b)) in
            [(0, a, of_a), (1, b, of_b)]
        {
            if !context.wants(input) {
                continue;
            }
            let options = MatMul {
                transpose_a,
                transpose_b,
                alpha,
            };
            let batch_is_summed = {
                let graph = &*context.graph;
                let rank = |value| graph.ty(value).map(|ty| ty.shape.rank());
                rank(left)?.max(rank(right)?) > rank(operand)?
            };
            if batch_is_summed {
                let gradient = context.graph.matmul_with(left, right, options, None)?;
                let gradient = context.graph.sum(gradient, &[0])?;
                context.add(input, gradient)?;
            } else {
                context.accumulate(input, |graph, sum| {
                    graph.matmul_with(left, right, options, sum)
                })?;
            }
        }
        if self.accumulate && context.wants(2) {
            context.add(2, dc)?;
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        if self.accumulate {
            vec![Alias {
                input: 2,
                output: 0,
                kind: AliasKind::Accumulate,
            }]
        } else {
            Vec::new()
        }
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let Sizes {
            batch,
            m,
            n,
            k,
            a_batched,
            b_batched,
        } = self.sizes(&io.inputs[0], &io.inputs[1])?;
        let (m_tiles, n_tiles) = (m.div_ceil(TILE), n.div_ceil(TILE));
        // Invocations of a workgroup: a square where the result is large, along the rows where it is narrow.
        let shape = |invocations: usize| {
            let across = n_tiles.next_power_of_two().min(8);
            let down = m_tiles.next_power_of_two().min(invocations / across).max(1);
            (down, across)
        };
        let groups =
            |(down, across): (usize, usize)| (m_tiles.div_ceil(down), n_tiles.div_ceil(across));
        let mut lanes = shape(64);
        for smaller in [32, 16] {
            let (down, across) = groups(lanes);
            if down * across * batch < ENOUGH_GROUPS {
                lanes = shape(smaller);
            }
        }
        let (m_groups, n_groups) = groups(lanes);
        // Four elements in a row are one load where every row of an operand starts at a multiple of four.
        let (a_row, b_row) = (
            if self.options.transpose_a { m } else { k },
            if self.options.transpose_b { k } else { n },
        );
        let aligned = a_row % 4 == 0 && b_row % 4 == 0;
        let whole_tiles = m % TILE == 0 && n % TILE == 0 && k % 4 == 0;
        let launch = Launch::new(shader!("matmul"), "forward")
            .constant("LANES_M", lanes.0 as f64)
            .constant("LANES_N", lanes.1 as f64)
            .constant("TRANSPOSE_A", self.options.transpose_a)
            .constant("TRANSPOSE_B", self.options.transpose_b)
            .constant("ALIGNED", aligned)
            .constant("EDGES", !whole_tiles)
            .constant("ACCUMULATE", self.accumulate)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .write(3, Slot::Output(0))
            .param(m)
            .param(n)
            .param(k)
            .param(if a_batched { m * k } else { 0 })
            .param(if b_batched { k * n } else { 0 })
            .param(self.options.alpha)
            .param(m_groups)
            .param(n_groups)
            .param(batch)
            .folded(m_groups * n_groups * batch, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
