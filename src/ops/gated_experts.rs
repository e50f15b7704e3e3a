//! The hidden numbers of feed-forward experts, `h[p] = f(Wg[e] xg[row p]) * (Wu[e] xu[row p])`: both grouped products and the activation
//! in one kernel.

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Shader, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::activation::ActivateBackward;
use crate::ops::expand::Expand;
use crate::ops::segment_outer::SegmentOuter;
use crate::ops::segments::{
    RowOf, expect_segments, gather, host_segments, lanes, products, row_share, weight_sizes,
};
use crate::ops::subgroup_tile::{SUBGROUP_TILE, subgroup_tiles};
use crate::ops::{
    Activation, ActiveGroups, HostIo, LaunchTypes, Layout, Op, Real, Segments, Work, dims_f32,
    expect_count, expect_dtype, expect_f32, shader,
};
use crate::tensor::{DType, TensorType};

/// Outputs that one invocation computes, as in `shaders/gated_experts.wgsl`.
const TILE_OUT: usize = 4;
const WORKGROUP: usize = 64;

/// Pairs that one invocation computes: eight of two products are more than the registers of some GPUs, and fewer loads on software adapters.
fn tile_pairs(class: AdapterClass) -> usize {
    match class {
        AdapterClass::Software => 8,
        AdapterClass::Discrete
        | AdapterClass::Integrated
        | AdapterClass::Virtual
        | AdapterClass::Other => 4,
    }
}

/// Inputs: x and weight of the gate, x and weight of up if `gated`, experts, order, offsets, the row of each pair if `mapped`.
/// Outputs: h, the gate before its activation, up if `gated`: all `[pairs, out]`.
#[derive(Clone, Copy, Debug)]
struct GatedExperts {
    activation: Activation,
    gated: bool,
    /// Gate and up read the same x.
    shared: bool,
    none: bool,
    mapped: bool,
}

/// Rows, and the experts' matrices `[experts, out, in]` that they are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// `[rows, in]`.
    pub x: Value,
    /// `[experts, out, in]`.
    pub weight: Value,
}

impl Graph {
    /// The hidden numbers `[pairs, out]` of feed-forward experts: `activation(gate) * up`, each the product of a pair's row with the
    /// matrix of its expert; without `up`, `activation(gate)`. With `groups` a pair reads the row of its token and its expert's group
    /// (x being `[tokens * groups.per_token(), in]`); without, the slots of a token share its row, as in [`Graph::shrink`].
    /// Pairs of no expert get zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn gated_experts(
        &mut self,
        activation: Activation,
        gate: Projection,
        up: Option<Projection>,
        segments: Segments,
        groups: Option<&ActiveGroups>,
    ) -> Result<Value> {
        if let Some(groups) = groups {
            let tokens = self.ty(groups.rows)?.dims()[0];
            let rows = self.ty(gate.x)?.shape.rows();
            if rows != tokens * groups.per_token {
                return Err(Error::shape(
                    "gated_experts",
                    format!(
                        "the gate's operand has {rows} rows, expected {} for each of {tokens} tokens",
                        groups.per_token
                    ),
                ));
            }
        }
        let op = GatedExperts {
            activation,
            gated: up.is_some(),
            shared: up.is_some_and(|up| up.x == gate.x),
            none: segments.none,
            mapped: groups.is_some(),
        };
        let projections = [gate].into_iter().chain(up);
        let mut inputs: Vec<Value> = projections.flat_map(|p| [p.x, p.weight]).collect();
        inputs.extend([segments.experts, segments.order, segments.offsets]);
        inputs.extend(groups.map(|groups| groups.rows));
        Ok(self.apply(op, &inputs)?[0])
    }
}

struct Sizes {
    pairs: usize,
    rows: usize,
    /// How many neighbouring pairs share a row; not used with `mapped`.
    share: usize,
    experts: usize,
    out: usize,
    input: usize,
}

impl GatedExperts {
    /// The number of the input that holds the experts; order, offsets and rows follow.
    fn experts(&self) -> usize {
        if self.gated { 4 } else { 2 }
    }

    fn count(&self) -> usize {
        self.experts() + 3 + usize::from(self.mapped)
    }

    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let first = self.experts();
        let [rows, width] = dims_f32(name, "the gate's operand", &inputs[0])?;
        let (experts, out, input) = weight_sizes(name, &inputs[1], Layout::OutIn)?;
        let pairs = expect_segments(
            name,
            &inputs[first + 1],
            &inputs[first + 2],
            experts,
            self.none,
        )?;
        if inputs[first].elements() != pairs || width != input {
            return Err(Error::shape(
                name,
                format!(
                    "{} rows, {} weights and {} experts do not fit",
                    inputs[0], inputs[1], inputs[first]
                ),
            ));
        }
        if self.gated {
            expect_f32(name, "up's operand", &inputs[2], &[rows, input])?;
            expect_f32(name, "up's weights", &inputs[3], &[experts, out, input])?;
        }
        let share = if self.mapped {
            let map = &inputs[first + 3];
            expect_dtype(name, "the rows", map, DType::I32)?;
            match *map.dims() {
                [tokens, _] if map == &inputs[first] && rows.is_multiple_of(tokens) => 1,
                _ => {
                    return Err(Error::shape(
                        name,
                        format!(
                            "{rows} rows, the experts are {}, their rows {map}",
                            inputs[first]
                        ),
                    ));
                }
            }
        } else {
            row_share(name, "the gate's operand", rows, pairs)?
        };
        Ok(Sizes {
            pairs,
            rows,
            share,
            experts,
            out,
            input,
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..self.count())
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let Sizes {
            share,
            experts,
            out,
            input,
            ..
        } = self.sizes(&types)?;
        let first = self.experts();
        let segments = host_segments(io.ints(first + 1)?, io.ints(first + 2)?);
        let row_of = if self.mapped {
            RowOf::Table(io.ints(first + 3)?)
        } else {
            RowOf::Share(share)
        };
        let mut results = [io.floats_out(1)?, &mut []];
        if self.gated {
            results[1] = io.floats_out(2)?;
        }
        for (which, result) in results.iter_mut().enumerate() {
            if which == 1 && !self.gated {
                break;
            }
            result.fill(R::zero());
            let (x, weight) = (io.floats(2 * which)?, io.floats(2 * which + 1)?);
            let rows = |pairs: &[i32]| gather(x, input, pairs, row_of, |_| R::one());
            let parts = products(
                &segments[..experts],
                weight,
                (out, input),
                Layout::OutIn,
                rows,
            );
            for (pairs, part) in segments.iter().zip(&parts) {
                for (&pair, row) in pairs.iter().zip(part.chunks(out)) {
                    result[pair as usize * out..][..out].copy_from_slice(row);
                }
            }
        }
        let h = io.floats_out(0)?;
        for (h, &gate) in h.iter_mut().zip(&*results[0]) {
            *h = self.activation.value(gate);
        }
        // Empty without a gate: nothing is multiplied.
        for (h, &up) in h.iter_mut().zip(&*results[1]) {
            *h *= up;
        }
        Ok(())
    }

    const SHADER: Shader = shader!("gated_experts", "activation", "segment_tile");

    fn launch(&self, shader: Shader, entry: &'static str, sizes: &Sizes) -> Launch {
        Launch::new(shader, entry)
            .param(sizes.pairs)
            .param(sizes.rows)
            .param(sizes.experts)
            .param(sizes.experts + usize::from(self.none))
            .param(sizes.out)
            .param(sizes.input)
            .param(sizes.share)
    }
}

impl Op for GatedExperts {
    fn name(&self) -> &'static str {
        "gated_experts"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            pairs,
            rows,
            experts,
            out,
            input,
            ..
        } = self.sizes(io.inputs)?;
        let products = 1 + usize::from(self.gated);
        let [activation, _] = self.activation.flops();
        let mut work = Work::moving(io);
        for product in 0..products {
            work = work
                .reading(2 * product, rows.min(pairs) * input)
                .reading(2 * product + 1, experts.min(pairs) * out * input);
        }
        // The order says which expert a pair has.
        let each = products * 2 * input + activation + usize::from(self.gated);
        Ok(work
            .reading(self.experts(), 0)
            .with_flops(pairs * out * each))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, self.count())?;
        let Sizes { pairs, out, .. } = self.sizes(inputs)?;
        let hidden = TensorType::f32([pairs, out]);
        Ok(vec![hidden; 2 + usize::from(self.gated)])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dh) = context.gradient(0) else {
            return Ok(());
        };
        let first = self.experts();
        let [experts, order, offsets] = [0, 1, 2].map(|i| context.input(first + i));
        let map = self.mapped.then(|| context.input(first + 3));
        let mut operands = vec![context.output(1)];
        if self.gated {
            operands.push(context.output(2));
        }
        operands.push(dh);
        let op = ActivateBackward {
            activation: self.activation,
            gated: self.gated,
        };
        let gradients = context.graph.apply(op, &operands)?;
        for (which, d) in gradients.into_iter().enumerate() {
            let (x, weight) = (context.input(2 * which), context.input(2 * which + 1));
            if context.wants(2 * which) {
                let rows = context.graph.ty(x)?.shape.rows();
                let experts_type = context.graph.ty(experts)?;
                let (pairs, tokens) = (experts_type.elements(), experts_type.shape.rows());
                let by_token = match map {
                    Some(_) => experts,
                    None => context.graph.reshape(experts, [rows, pairs / rows])?,
                };
                context.accumulate(2 * which, |graph, base| {
                    let op = Expand {
                        layout: Layout::InOut,
                        scale: 1.0,
                        gated: false,
                        accumulate: base.is_some(),
                        none: self.none,
                        rows_per_token: map.map(|_| rows / tokens),
                    };
                    let inputs = [d, weight, by_token, order, offsets];
                    let inputs = inputs.into_iter().chain(map).chain(base);
                    graph.apply1(op, &inputs.collect::<Vec<_>>())
                })?;
            }
            if context.wants(2 * which + 1) {
                let op = SegmentOuter {
                    scale: 1.0,
                    gated: false,
                    none: self.none,
                    right_mapped: self.mapped,
                };
                let inputs = [d, x, order, offsets].into_iter().chain(map);
                let gradient = context.graph.apply1(op, &inputs.collect::<Vec<_>>())?;
                context.add(2 * which + 1, gradient)?;
            }
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = self.sizes(io.inputs)?;
        let segments = sizes.experts + usize::from(self.none);
        let first = self.experts();
        let mut launches = Launches::default();
        let words = segments + 1 + 2 * sizes.pairs;
        let table = launches.scratch_words(words);
        // Without a map its binding is not read: any buffer will do.
        let map = if self.mapped { first + 3 } else { first + 1 };
        launches.launches.push(
            self.launch(Self::SHADER, "plan", &sizes)
                .constant("MAPPED", self.mapped)
                .read(9, Slot::Input(first + 1))
                .read(10, Slot::Input(first + 2))
                .read(11, Slot::Input(map))
                .write(12, table)
                .param(0_usize)
                .folded(words.div_ceil(WORKGROUP), capabilities)?,
        );
        // Without a gate nothing reads or writes the bindings of up, but buffers must be there.
        let (up_x, up_weight, up) = if self.gated {
            (2, 3, Slot::Output(2))
        } else {
            (0, 1, launches.scratch_words(4))
        };
        let by_subgroups = subgroup_tiles(capabilities)
            && sizes.input.is_multiple_of(4)
            && sizes.out.is_multiple_of(4);
        let (launch, pairs_per_tile, outputs_per_tile) = if by_subgroups {
            let shader = shader!(
                "gated_experts_subgroup",
                "subgroup_tile",
                "activation",
                "segment_tile"
            );
            let launch = self.launch(shader, "forward", &sizes);
            (launch, SUBGROUP_TILE, SUBGROUP_TILE)
        } else {
            let tile_pairs = tile_pairs(capabilities.class);
            let (lanes_pairs, lanes_out) =
                lanes([sizes.pairs, segments, sizes.out], [tile_pairs, TILE_OUT]);
            let launch = self
                .launch(Self::SHADER, "forward", &sizes)
                .constant("LANES_PAIRS", lanes_pairs as f64)
                .constant("LANES_OUT", lanes_out as f64)
                .constant("PAIRS", tile_pairs as f64)
                .constant("ALIGNED", sizes.input.is_multiple_of(4));
            (launch, lanes_pairs * tile_pairs, lanes_out * TILE_OUT)
        };
        // Every segment's last tile may be partly empty: at most one more tile a segment.
        let tiles = sizes.pairs.div_ceil(pairs_per_tile) + segments.min(sizes.pairs);
        let out_groups = sizes.out.div_ceil(outputs_per_tile);
        launches.launches.push(
            launch
                .constant("GATED", self.gated)
                .constant("SHARED", self.shared)
                .constant("ACTIVATION", self.activation.code())
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .read(3, Slot::Input(up_x))
                .read(4, Slot::Input(up_weight))
                .read(5, table)
                .write(6, Slot::Output(0))
                .write(7, Slot::Output(1))
                .write(8, up)
                .param(out_groups)
                .folded(tiles * out_groups, capabilities)?,
        );
        Ok(launches)
    }

    host_reference!();
}
