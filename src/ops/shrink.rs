//! Grouped shrink: each (token, slot) pair's row times the matrix of the pair's expert, `z[p] = W[e(p)] x[p / share]`.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::expand::Expand;
use crate::ops::segment_outer::SegmentOuter;
use crate::ops::segments::{
    RowOf, expect_segments, gather, host_segments, products, row_share, spread_evenly, weight_sizes,
};
use crate::ops::shrink_choice::{Grouped, Kernel, TILE};
use crate::ops::subgroup_tile::SUBGROUP_TILE;
use crate::ops::{
    Choice, HostIo, LaunchTypes, Layout, Op, Real, Segments, Work, dims_f32, expect_count, shader,
};
use crate::tensor::{Tensor, TensorType};

/// Inputs: x `[rows, in]`, weight, experts, order, offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shrink {
    pub(crate) layout: Layout,
    pub(crate) none: bool,
}

impl Graph {
    /// `z[p] = W[e(p)] x[p / share]`: `x` is `[rows, in]`, `weight` holds one matrix an expert, the result is `[pairs, out]`. With
    /// fewer rows than pairs, `share = pairs / rows` neighbouring pairs (the slots of a token) use one row. No row is copied.
    /// Pairs of no expert get zeros.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit.
    pub fn shrink(
        &mut self,
        x: Value,
        weight: Value,
        layout: Layout,
        segments: Segments,
    ) -> Result<Value> {
        self.apply1(
            Shrink {
                layout,
                none: segments.none,
            },
            &[
                x,
                weight,
                segments.experts,
                segments.order,
                segments.offsets,
            ],
        )
    }
}

/// Sizes of a grouped product.
pub(crate) struct Sizes {
    pub(crate) pairs: usize,
    pub(crate) share: usize,
    pub(crate) experts: usize,
    pub(crate) out: usize,
    pub(crate) input: usize,
}

/// A second product that is added: its rows, one a pair, its weights, and how wide they are.
#[derive(Clone, Copy)]
pub(crate) struct Second {
    pub(crate) x: Slot,
    pub(crate) weight: Slot,
    pub(crate) input: usize,
}

impl Shrink {
    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let [rows, width] = dims_f32(name, "the operand", &inputs[0])?;
        let (experts, out, input) = weight_sizes(name, &inputs[1], self.layout)?;
        let pairs = expect_segments(name, &inputs[3], &inputs[4], experts, self.none)?;
        if inputs[2].elements() != pairs || width != input {
            return Err(crate::Error::shape(
                name,
                format!(
                    "{} rows, {} weights and {} experts do not fit",
                    inputs[0], inputs[1], inputs[2]
                ),
            ));
        }
        let share = row_share(name, "the operand", rows, pairs)?;
        Ok(Sizes {
            pairs,
            share,
            experts,
            out,
            input,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..5)
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let Sizes {
            share,
            experts,
            out,
            input,
            ..
        } = self.sizes(&types)?;
        let (x, weight, order, offsets) = (io.floats(0)?, io.floats(1)?, io.ints(3)?, io.ints(4)?);
        let segments = host_segments(order, offsets);
        let rows = |pairs: &[i32]| gather(x, input, pairs, RowOf::Share(share), |_| R::one());
        let parts = products(
            &segments[..experts],
            weight,
            (out, input),
            self.layout,
            rows,
        );
        let z = io.floats_out(0)?;
        for (pairs, part) in segments.iter().zip(&parts) {
            for (&pair, row) in pairs.iter().zip(part.chunks(out)) {
                z[pair as usize * out..][..out].copy_from_slice(row);
            }
        }
        for &pair in segments[experts..].iter().copied().flatten() {
            z[pair as usize * out..][..out].fill(R::zero());
        }
        Ok(())
    }
}

impl Op for Shrink {
    fn name(&self) -> &'static str {
        "shrink"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            pairs,
            experts,
            out,
            input,
            ..
        } = self.sizes(io.inputs)?;
        // The order says which expert a pair has.
        Ok(Work::moving(io)
            .reading(1, experts.min(pairs) * out * input)
            .reading(2, 0)
            .with_flops(2 * pairs * out * input))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 5)?;
        let Sizes { pairs, out, .. } = self.sizes(inputs)?;
        Ok(vec![TensorType::f32([pairs, out])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dz) = context.gradient(0) else {
            return Ok(());
        };
        let [x, weight, experts, order, offsets] =
            [0, 1, 2, 3, 4].map(|input| context.input(input));
        if context.wants(0) {
            let rows = context.graph.ty(x)?.shape.rows();
            let pairs = context.graph.ty(dz)?.shape.rows();
            let by_row = context.graph.reshape(experts, [rows, pairs / rows])?;
            let layout = self.layout.flipped();
            context.accumulate(0, |graph, base| {
                let op = Expand {
                    layout,
                    scale: 1.0,
                    gated: false,
                    accumulate: base.is_some(),
                    none: self.none,
                    rows_per_token: None,
                };
                let inputs = [dz, weight, by_row, order, offsets];
                graph.apply1(op, &inputs.into_iter().chain(base).collect::<Vec<_>>())
            })?;
        }
        if context.wants(1) {
            let (left, right) = if self.layout == Layout::OutIn {
                (dz, x)
            } else {
                (x, dz)
            };
            let gradient = context.graph.apply1(
                SegmentOuter {
                    scale: 1.0,
                    gated: false,
                    none: self.none,
                    right_mapped: false,
                },
                &[left, right, order, offsets],
            )?;
            context.add(1, gradient)?;
        }
        Ok(())
    }

    fn choice(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Option<Choice>> {
        let sizes = self.sizes(io.inputs)?;
        Ok(Some(self.grouped(&sizes).choice(capabilities)))
    }

    fn sample_integers(&self, inputs: &[TensorType]) -> Result<Option<Vec<Tensor>>> {
        let Sizes { experts, .. } = self.sizes(inputs)?;
        spread_evenly(experts, &inputs[2..])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = self.sizes(io.inputs)?;
        let operands = [
            Slot::Input(0),
            Slot::Input(1),
            Slot::Input(3),
            Slot::Input(4),
        ];
        let launch = self.launch(&sizes, operands, Slot::Output(0), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}

impl Shrink {
    fn grouped<'a>(&self, sizes: &'a Sizes) -> Grouped<'a> {
        Grouped {
            name: match self.layout {
                Layout::OutIn => "shrink nt",
                Layout::InOut => "shrink nn",
            },
            sizes,
            segments: sizes.experts + usize::from(self.none),
        }
    }

    /// The product of x, weight, order and offsets into z: here, and in the wide form of expand.
    pub(crate) fn launch(
        &self,
        sizes: &Sizes,
        [x, weight, order, offsets]: [Slot; 4],
        z: Slot,
        capabilities: &Capabilities,
    ) -> Result<Launch> {
        let &Sizes {
            pairs,
            share,
            experts,
            out,
            input,
        } = sizes;
        let grouped = self.grouped(sizes);
        let kernel = grouped.chosen(capabilities);
        let entry = match kernel {
            Kernel::Subgroup => {
                let operands = [x, weight, order, offsets];
                return self.by_subgroups(sizes, None, operands, z, capabilities);
            }
            Kernel::Direct => "forward",
            Kernel::Split => "split",
        };
        let segments = grouped.segments;
        let [lanes_pairs, lanes_out, lanes_k] = grouped.lanes(kernel);
        // Every segment's last tile may be partly empty: at most one more tile an expert.
        let tiles = pairs.div_ceil(lanes_pairs * TILE) + segments.min(pairs);
        let out_groups = out.div_ceil(lanes_out * TILE);
        let weight_row = if self.layout == Layout::OutIn {
            input
        } else {
            out
        };
        let aligned = input % 4 == 0 && weight_row % 4 == 0;
        let mut launch = Launch::new(shader!("shrink", "segment_tile"), entry);
        if kernel == Kernel::Split {
            launch = launch.constant("LANES_K", lanes_k as f64);
        }
        launch
            .constant("LANES_OUT", lanes_out as f64)
            .constant("LANES_PAIRS", lanes_pairs as f64)
            .constant("OUT_IN", self.layout == Layout::OutIn)
            .constant("ALIGNED", aligned)
            .read(1, x)
            .read(2, weight)
            .read(3, order)
            .read(4, offsets)
            .write(5, z)
            .param(experts)
            .param(segments)
            .param(out)
            .param(input)
            .param(share)
            .param(out_groups)
            .folded(tiles * out_groups, capabilities)
    }

    /// `shaders/shrink_subgroup.wgsl`: the widths are multiples of four.
    pub(crate) fn by_subgroups(
        &self,
        sizes: &Sizes,
        second: Option<Second>,
        [x, weight, order, offsets]: [Slot; 4],
        z: Slot,
        capabilities: &Capabilities,
    ) -> Result<Launch> {
        let segments = sizes.experts + usize::from(self.none);
        let tiles = sizes.pairs.div_ceil(SUBGROUP_TILE) + segments.min(sizes.pairs);
        let out_groups = sizes.out.div_ceil(SUBGROUP_TILE);
        let shader = shader!("shrink_subgroup", "subgroup_tile", "segment_tile");
        Launch::new(shader, "forward")
            .constant("OUT_IN", self.layout == Layout::OutIn)
            .constant("TWO", second.is_some())
            .read(1, x)
            .read(2, weight)
            .read(3, order)
            .read(4, offsets)
            .write(5, z)
            .read(6, second.map_or(x, |second| second.x))
            .read(7, second.map_or(weight, |second| second.weight))
            .param(sizes.experts)
            .param(segments)
            .param(sizes.out)
            .param(sizes.input)
            .param(sizes.share)
            .param(second.map_or(0, |second| second.input))
            .param(out_groups)
            .folded(tiles * out_groups, capabilities)
    }
}
