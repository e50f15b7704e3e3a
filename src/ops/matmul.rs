//! Matrix products, in all transposes, batched, with a bias, and added into a tensor that is already there.

use crate::device::{Capabilities, Launches};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::matmul_choice;
use crate::ops::matmul_kernels::{self, Launched};
use crate::ops::{
    Alias, AliasKind, Choice, HostIo, LaunchTypes, Op, Real, Work, expect_count, expect_dtype,
    expect_f32,
};
use crate::tensor::{DType, TensorType};

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

/// Inputs: a, b, those of the second product if there is one, the bias and the base if there are.
#[derive(Clone, Copy, Debug)]
struct MatMulOp {
    options: MatMul,
    second: Option<MatMul>,
    bias: bool,
    accumulate: bool,
}

/// One of two products that are summed: see [`Graph::matmul_sum`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// The left operand.
    pub a: Value,
    /// The right operand.
    pub b: Value,
    /// Transposes, and the factor in front.
    pub options: MatMul,
}

impl Product {
    /// `a bᵀ`.
    #[must_use]
    pub fn nt(a: Value, b: Value) -> Self {
        let options = MatMul {
            transpose_b: true,
            ..MatMul::default()
        };
        Self { a, b, options }
    }

    /// The same with another factor in front.
    #[must_use]
    pub fn scaled(mut self, alpha: f32) -> Self {
        self.options.alpha = alpha;
        self
    }
}

/// The sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a_batched: bool,
    pub(crate) b_batched: bool,
}

impl Sizes {
    /// How many elements lie between an operand's batch entries, a and b: 0 where all share it.
    pub(crate) fn batch_steps(&self) -> [usize; 2] {
        let step = |batched: bool, size: usize| if batched { size } else { 0 };
        [
            step(self.a_batched, self.m * self.k),
            step(self.b_batched, self.k * self.n),
        ]
    }
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
        let product = self.apply_product(Product { a, b, options }, None, [None, base])?;
        if self.are_matrices(a, b)? {
            self.products
                .insert(product, (Product { a, b, options }, base));
        }
        Ok(product)
    }

    /// `first + second`, two products of matrices of the same size, in one kernel: what an adapter adds to its layer is added where the
    /// layer's tile is still in registers.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, or an operand has a batch dimension.
    pub fn matmul_sum(&mut self, first: Product, second: Product) -> Result<Value> {
        self.apply_product(first, Some(second), [None; 2])
    }

    /// `alpha op(a) op(b) + bias`, the bias `[n]` added to every row in the kernel that makes the product.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul_bias(&mut self, product: Product, bias: Value) -> Result<Value> {
        self.apply_product(product, None, [Some(bias), None])
    }

    /// `sum + product`, where nothing else will read `sum`: if that is itself a product, both are made by one kernel.
    pub(crate) fn matmul_onto(&mut self, sum: Option<Value>, product: Product) -> Result<Value> {
        let Product { a, b, options } = product;
        let matrices = self.are_matrices(a, b)?;
        match sum.and_then(|sum| self.products.get(&sum)) {
            Some(&(first, base)) if matrices => {
                self.apply_product(first, Some(product), [None, base])
            }
            _ => self.matmul_with(a, b, options, sum),
        }
    }

    fn are_matrices(&self, a: Value, b: Value) -> Result<bool> {
        Ok(self.ty(a)?.shape.rank() == 2 && self.ty(b)?.shape.rank() == 2)
    }

    fn apply_product(
        &mut self,
        first: Product,
        second: Option<Product>,
        [bias, base]: [Option<Value>; 2],
    ) -> Result<Value> {
        let op = MatMulOp {
            options: first.options,
            second: second.map(|second| second.options),
            bias: bias.is_some(),
            accumulate: base.is_some(),
        };
        let products = [first].into_iter().chain(second);
        let mut inputs: Vec<Value> = products.flat_map(|one| [one.a, one.b]).collect();
        inputs.extend(bias);
        inputs.extend(base);
        self.apply1(op, &inputs)
    }
}

impl MatMulOp {
    /// How many inputs are operands of products; the bias follows them.
    fn operands(&self) -> usize {
        if self.second.is_some() { 4 } else { 2 }
    }

    /// The number of the input that is added into.
    fn base(&self) -> usize {
        self.operands() + usize::from(self.bias)
    }

    fn product(&self, inputs: &[TensorType]) -> Result<Launched> {
        let first = Self::sizes(self.options, &inputs[0], &inputs[1])?;
        let second = self
            .second
            .map(|options| {
                let sizes = Self::sizes(options, &inputs[2], &inputs[3])?;
                let matrices = [first, sizes]
                    .iter()
                    .all(|sizes| !sizes.a_batched && !sizes.b_batched);
                if matrices && (sizes.m, sizes.n) == (first.m, first.n) {
                    Ok((options, sizes))
                } else {
                    Err(Error::shape(
                        "matmul",
                        format!(
                            "the products of {} and {} and of {} and {} cannot be added",
                            inputs[0], inputs[1], inputs[2], inputs[3]
                        ),
                    ))
                }
            })
            .transpose()?;
        Ok(Launched {
            first: (self.options, first),
            second,
            bias: self.bias.then(|| self.operands()),
            accumulate: self.accumulate,
        })
    }

    fn sizes(options: MatMul, a: &TensorType, b: &TensorType) -> Result<Sizes> {
        let wrong = || {
            let marks =
                [options.transpose_a, options.transpose_b].map(|t| if t { "ᵀ" } else { "" });
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
        let (m, k) = if options.transpose_a {
            (a_columns, a_rows)
        } else {
            (a_rows, a_columns)
        };
        let (b_k, n) = if options.transpose_b {
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
        let out = io.floats_out(0)?;
        for (which, options) in [Some(self.options), self.second]
            .into_iter()
            .flatten()
            .enumerate()
        {
            let (left, right) = (2 * which, 2 * which + 1);
            let sizes = Self::sizes(options, io.input_type(left)?, io.input_type(right)?)?;
            let Sizes { batch, m, n, k, .. } = sizes;
            let (a, b) = (io.floats(left)?, io.floats(right)?);
            let (ta, tb) = (options.transpose_a, options.transpose_b);
            for index in 0..batch {
                let at = |batched: bool, size: usize| if batched { index * size } else { 0 };
                let (a, b) = (
                    &a[at(sizes.a_batched, m * k)..],
                    &b[at(sizes.b_batched, k * n)..],
                );
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
                gemm(
                    &mut out[index * m * n..(index + 1) * m * n],
                    left.transposed_if(ta),
                    right.transposed_if(tb),
                    R::of(f64::from(options.alpha)),
                    self.accumulate || which > 0,
                    true,
                );
            }
        }
        if self.bias {
            let bias = io.floats(self.operands())?;
            for row in out.chunks_mut(bias.len().max(1)) {
                for (c, &b) in row.iter_mut().zip(bias) {
                    *c += b;
                }
            }
        }
        Ok(())
    }
}

impl MatMulOp {
    /// The gradients of the operands of one product, the left of which is the input of this number.
    fn product_backward(
        context: &mut Backward<'_>,
        options: MatMul,
        first: usize,
        dc: Value,
    ) -> Result<()> {
        let (a, b) = (context.input(first), context.input(first + 1));
        let MatMul {
            transpose_a,
            transpose_b,
            alpha,
        } = options;
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
            [(first, a, of_a), (first + 1, b, of_b)]
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
                let product = Product {
                    a: left,
                    b: right,
                    options,
                };
                context.accumulate(input, |graph, sum| graph.matmul_onto(sum, product))?;
            }
        }
        Ok(())
    }
}

impl Op for MatMulOp {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let product = self.product(io.inputs)?;
        let flops = |sizes: &Sizes| 2 * sizes.batch * sizes.m * sizes.n * sizes.k;
        let second = product.second.map_or(0, |(_, sizes)| flops(&sizes));
        let Sizes { batch, m, n, .. } = product.first.1;
        let bias = if self.bias { batch * m * n } else { 0 };
        Ok(Work::moving(io).with_flops(flops(&product.first.1) + second + bias))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let base = self.base();
        expect_count(self.name(), inputs, base + usize::from(self.accumulate))?;
        for (input, side) in inputs[..self.operands()]
            .iter()
            .zip(["left", "right"].iter().cycle())
        {
            expect_dtype(
                self.name(),
                &format!("the {side} operand"),
                input,
                DType::F32,
            )?;
        }
        let Sizes {
            batch,
            m,
            n,
            a_batched,
            b_batched,
            ..
        } = self.product(inputs)?.first.1;
        let dims = if a_batched || b_batched {
            vec![batch, m, n]
        } else {
            vec![m, n]
        };
        if self.bias {
            expect_f32(self.name(), "the bias", &inputs[self.operands()], &[n])?;
        }
        if self.accumulate {
            expect_f32(self.name(), "the tensor added into", &inputs[base], &dims)?;
        }
        Ok(vec![TensorType::f32(dims)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dc) = context.gradient(0) else {
            return Ok(());
        };
        for (which, options) in [Some(self.options), self.second]
            .into_iter()
            .flatten()
            .enumerate()
        {
            Self::product_backward(context, options, 2 * which, dc)?;
        }
        let bias = self.operands();
        if self.bias && context.wants(bias) {
            // A column sum, over the entries of a batch too.
            let rank = context.graph.ty(dc)?.shape.rank();
            let rows: Vec<usize> = (0..rank - 1).collect();
            let gradient = context.graph.sum(dc, &rows)?;
            context.add(bias, gradient)?;
        }
        if self.accumulate && context.wants(self.base()) {
            context.add(self.base(), dc)?;
        }
        Ok(())
    }

    fn aliases(&self) -> Vec<Alias> {
        if self.accumulate {
            vec![Alias {
                input: self.base(),
                output: 0,
                kind: AliasKind::Accumulate,
            }]
        } else {
            Vec::new()
        }
    }

    fn choice(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Option<Choice>> {
        let product = self.product(io.inputs)?;
        Ok(Some(matmul_choice::choice(&product, capabilities)))
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        matmul_kernels::launches(&self.product(io.inputs)?, capabilities)
    }

    host_reference!();
}
