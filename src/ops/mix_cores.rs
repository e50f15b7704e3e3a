//! CoMoL's soft merge (section 5 of the mathematics): `u[t] = sum_e g[t, e] M[e]ᵀ z[t]`, without a matrix a token in memory.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::core_gradient::CoreGradient;
use crate::ops::segment_outer::SegmentOuter;
use crate::ops::segments::expect_segments;
use crate::ops::{
    HostIo, LaunchTypes, Op, Real, Routed, Segments, Work, dims_f32, expect_count, expect_f32,
    expect_i32, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;
/// Elements of a row that one invocation has, as in `shaders/parts/core_mixture.wgsl`.
pub(crate) const TILE: usize = 4;
/// The most invocations of the backward kernel that share a token.
const MAX_LANES: usize = 16;

/// Invocations that must be left before one takes four tokens in place of one: few for a software driver, which has as many at work
/// as the CPU has lanes; enough for a GPU to hide loads behind others.
fn enough_invocations(class: AdapterClass) -> usize {
    match class {
        AdapterClass::Software => 256,
        _ => 8192,
    }
}

/// In which order the soft merge is summed. The results are equal up to rounding; with S slots (the experts of a dense gate, or
/// top-k) and rank r, both take S r² multiply-adds a token, and more as follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreMix {
    /// `Merge` if there are at least half as many slots as the rank, else `Apply`.
    #[default]
    Auto,
    /// The token's matrix `C = sum_e g_e M_e` first, in registers, then `Cᵀ z`: r² more multiply-adds.
    Merge,
    /// `M_eᵀ z` for each expert, mixed by the gates: S r more.
    Apply,
}

impl CoreMix {
    /// Whether the cores are merged first.
    pub(crate) fn merges(self, slots: usize, rank: usize) -> bool {
        match self {
            // By the count of multiply-adds, slots and rank would have to be equal; but merging runs over longer rows. At 4096 tokens,
            // Mesa's software GPU and the CPU take 4.3 and 1.2 ms to merge 8 slots of rank 16, 4.0 and 2.3 ms to apply them; for 64
            // slots it is 29 and 6.6 ms against 31 and 16.7 ms, for 32 of rank 4 1.1 and 0.7 ms against 1.4 and 3.3 ms.
            Self::Auto => 2 * slots >= rank,
            Self::Merge => true,
            Self::Apply => false,
        }
    }
}

/// Inputs: z `[tokens, rank]`, core `[experts, rank, rank]`, gates `[tokens, slots]`; if `routed` the experts `[tokens, slots]`, the
/// order and the offsets.
#[derive(Clone, Copy, Debug)]
struct MixCores {
    mix: CoreMix,
    routed: bool,
    /// Whether there is a segment of pairs that belong to no expert.
    none: bool,
}

/// Inputs: z, core, gates, du; if `routed` the experts. Outputs: dz, the gradient of the gates.
#[derive(Clone, Copy, Debug)]
struct MixCoresBackward {
    routed: bool,
}

impl Graph {
    /// `u[t] = sum over the experts e of gates[t, e] M[e]ᵀ z[t]`: `z` is `[tokens, rank]`, `core` `[experts, rank, rank]`, `gates`
    /// `[tokens, experts]`, the result `[tokens, rank]` (arXiv 2603.00573, soft merging; any rank).
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn mix_cores(
        &mut self,
        z: Value,
        core: Value,
        gates: Value,
        mix: CoreMix,
    ) -> Result<Value> {
        let op = MixCores {
            mix,
            routed: false,
            none: false,
        };
        self.apply1(op, &[z, core, gates])
    }

    /// [`Graph::mix_cores`] over the experts that each token was routed to.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn mix_routed_cores(
        &mut self,
        z: Value,
        core: Value,
        routed: Routed,
        mix: CoreMix,
    ) -> Result<Value> {
        let Segments {
            experts,
            order,
            offsets,
            none,
        } = routed.segments;
        let inputs = [z, core, routed.gates, experts, order, offsets];
        let op = MixCores {
            mix,
            routed: true,
            none,
        };
        self.apply1(op, &inputs)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) tokens: usize,
    pub(crate) slots: usize,
    pub(crate) experts: usize,
    pub(crate) rank: usize,
}

impl Sizes {
    /// Tokens that an invocation takes: under a dense gate, where four share the experts' matrices, four if there are enough.
    pub(crate) fn tokens_each(self, routed: bool, capabilities: &Capabilities) -> usize {
        let invocations = self.tokens.div_ceil(4) * self.rank.div_ceil(TILE);
        if !routed && invocations >= enough_invocations(capabilities.class) {
            4
        } else {
            1
        }
    }
}

/// Checks z, core, gates, and the experts if there are any.
fn sizes(op: &'static str, inputs: &[TensorType], chosen: Option<&TensorType>) -> Result<Sizes> {
    let [tokens, rank] = dims_f32(op, "the latents", &inputs[0])?;
    let [experts, ..] = dims_f32::<3>(op, "the core matrices", &inputs[1])?;
    expect_f32(op, "the core matrices", &inputs[1], &[experts, rank, rank])?;
    let [_, slots] = dims_f32(op, "the gates", &inputs[2])?;
    expect_f32(op, "the gates", &inputs[2], &[tokens, slots])?;
    match chosen {
        Some(chosen) => expect_i32(op, "the experts", chosen, &[tokens, slots])?,
        None if slots != experts => {
            return Err(Error::shape(
                op,
                format!("{slots} gates a token for {experts} experts"),
            ));
        }
        None => {}
    }
    Ok(Sizes {
        tokens,
        slots,
        experts,
        rank,
    })
}

/// The matrices of a token's experts, each with its slot; an expert past the last is skipped.
fn cores<'a, R: Real>(
    core: &'a [R],
    rank: usize,
    slots: usize,
    chosen: Option<&'a [i32]>,
    token: usize,
) -> impl Iterator<Item = (usize, &'a [R])> + Clone {
    (0..slots).filter_map(move |slot| {
        let expert = match chosen {
            Some(chosen) => usize::try_from(chosen[token * slots + slot]).ok()?,
            None => slot,
        };
        let matrix = core.chunks_exact(rank * rank).nth(expert)?;
        Some((slot, matrix))
    })
}

/// A token's u, from the matrices of its experts, each with its slot.
pub(crate) fn mix<'a, R: Real>(
    u: &mut [R],
    z: &'a [R],
    gates: &'a [R],
    cores: impl Iterator<Item = (usize, &'a [R])>,
    merges: bool,
) {
    let rank = z.len();
    u.fill(R::zero());
    if merges {
        let mut merged = vec![R::zero(); rank * rank];
        for (slot, matrix) in cores {
            for (merged, &m) in merged.iter_mut().zip(matrix) {
                *merged += gates[slot] * m;
            }
        }
        for (row, &z) in merged.chunks(rank).zip(z) {
            for (u, &m) in u.iter_mut().zip(row) {
                *u += z * m;
            }
        }
        return;
    }
    let mut part = vec![R::zero(); rank];
    for (slot, matrix) in cores {
        part.fill(R::zero());
        for (row, &z) in matrix.chunks(rank).zip(z) {
            for (part, &m) in part.iter_mut().zip(row) {
                *part += z * m;
            }
        }
        for (u, &part) in u.iter_mut().zip(&part) {
            *u += gates[slot] * part;
        }
    }
}

/// Adds to a token's dz and to the gradients of its gates, from z and du and the matrices of its experts.
pub(crate) fn mix_gradient<'a, R: Real>(
    dz: &mut [R],
    d_gates: &mut [R],
    (z, du): (&'a [R], &'a [R]),
    gates: &'a [R],
    cores: impl Iterator<Item = (usize, &'a [R])>,
) {
    for (slot, matrix) in cores {
        for ((row, &z), dz) in matrix.chunks(z.len()).zip(z).zip(&mut *dz) {
            let w: R = row.iter().zip(du).map(|(&m, &du)| m * du).sum();
            *dz += gates[slot] * w;
            d_gates[slot] += z * w;
        }
    }
}

fn launch(entry: &'static str, sizes: Sizes, routed: bool) -> Launch {
    let Sizes {
        tokens,
        slots,
        experts,
        rank,
    } = sizes;
    Launch::new(shader!("mix_cores", "core_mixture"), entry)
        .constant("ROUTED", routed)
        .constant("ALIGNED", rank.is_multiple_of(TILE))
        .param(tokens)
        .param(slots)
        .param(experts)
        .param(rank)
        .param(rank.div_ceil(TILE))
}

impl MixCores {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (rank, slots) = (
            io.input_type(0)?.shape.last(),
            io.input_type(2)?.shape.last(),
        );
        let (z, core, gates) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let chosen = if self.routed { Some(io.ints(3)?) } else { None };
        let u = io.floats_out(0)?;
        let rows = u.par_chunks_mut(rank).zip(z.par_chunks(rank)).enumerate();
        let merges = self.mix.merges(slots, rank);
        rows.for_each(|(token, (u, z))| {
            let gates = &gates[token * slots..(token + 1) * slots];
            mix(u, z, gates, cores(core, rank, slots, chosen, token), merges);
        });
        Ok(())
    }
}

impl Op for MixCores {
    fn name(&self) -> &'static str {
        "mix_cores"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            slots,
            experts,
            rank,
        } = sizes(self.name(), io.inputs, io.inputs.get(3))?;
        // The experts say everything that order and offsets do.
        Ok(Work::moving(io)
            .reading(1, experts.min(tokens * slots) * rank * rank)
            .reading(4, 0)
            .reading(5, 0)
            .with_flops(tokens * slots * (2 * rank * rank + rank)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, if self.routed { 6 } else { 3 })?;
        let Sizes {
            tokens,
            experts,
            rank,
            ..
        } = sizes(self.name(), inputs, inputs.get(3))?;
        if self.routed {
            expect_segments(self.name(), &inputs[4], &inputs[5], experts, self.none)?;
        }
        Ok(vec![TensorType::f32([tokens, rank])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(du) = context.gradient(0) else {
            return Ok(());
        };
        let [z, core, gates] = [0, 1, 2].map(|input| context.input(input));
        let routed = self.routed;
        if context.wants(0) || context.wants(2) {
            let chosen = routed.then(|| context.input(3));
            let inputs: Vec<Value> = [z, core, gates, du].into_iter().chain(chosen).collect();
            let gradients = context.graph.apply(MixCoresBackward { routed }, &inputs)?;
            for (input, gradient) in [(0, gradients[0]), (2, gradients[1])] {
                if context.wants(input) {
                    context.add(input, gradient)?;
                }
            }
        }
        if context.wants(1) {
            let gradient = if routed {
                let op = SegmentOuter {
                    scale: 1.0,
                    gated: true,
                    none: self.none,
                    right_mapped: false,
                };
                let (order, offsets) = (context.input(4), context.input(5));
                context.graph.apply1(op, &[z, du, order, offsets, gates])?
            } else {
                context
                    .graph
                    .apply1(CoreGradient { router: false }, &[z, du, gates])?
            };
            context.add(1, gradient)?;
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = sizes(self.name(), io.inputs, io.inputs.get(3))?;
        let each = sizes.tokens_each(self.routed, capabilities);
        let entry = match (self.mix.merges(sizes.slots, sizes.rank), each) {
            (true, 1) => "merge",
            (true, _) => "merge_four",
            (false, 1) => "apply",
            (false, _) => "apply_four",
        };
        // Without routing the binding is not read: any buffer will do.
        let chosen = Slot::Input(if self.routed { 3 } else { 0 });
        let blocks = sizes.tokens.div_ceil(each) * sizes.rank.div_ceil(TILE);
        let mut launch = launch(entry, sizes, self.routed)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .write(6, Slot::Output(0));
        if each == 1 {
            launch = launch.read(4, chosen);
        }
        Ok(launch
            .folded(blocks.div_ceil(WORKGROUP), capabilities)?
            .into())
    }

    host_reference!();
}

impl MixCoresBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (rank, slots) = (
            io.input_type(0)?.shape.last(),
            io.input_type(2)?.shape.last(),
        );
        let (z, core, gates, du) = (io.floats(0)?, io.floats(1)?, io.floats(2)?, io.floats(3)?);
        let chosen = if self.routed { Some(io.ints(4)?) } else { None };
        let (dz, d_gates) = (io.floats_out(0)?, io.floats_out(1)?);
        let rows = dz
            .par_chunks_mut(rank)
            .zip(d_gates.par_chunks_mut(slots))
            .enumerate();
        rows.for_each(|(token, (dz, d_gates))| {
            dz.fill(R::zero());
            d_gates.fill(R::zero());
            let here = token * rank..(token + 1) * rank;
            let (z, du) = (&z[here.clone()], &du[here]);
            let gates = &gates[token * slots..(token + 1) * slots];
            let cores = cores(core, rank, slots, chosen, token);
            mix_gradient(dz, d_gates, (z, du), gates, cores);
        });
        Ok(())
    }
}

impl Op for MixCoresBackward {
    fn name(&self) -> &'static str {
        "mix_cores_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            slots,
            experts,
            rank,
        } = sizes(self.name(), io.inputs, io.inputs.get(4))?;
        // M du, its multiple added to dz, its product with z.
        Ok(Work::moving(io)
            .reading(1, experts.min(tokens * slots) * rank * rank)
            .with_flops(tokens * slots * (2 * rank * rank + 4 * rank)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 4 + usize::from(self.routed))?;
        sizes(self.name(), inputs, inputs.get(4))?;
        expect_f32(self.name(), "du", &inputs[3], inputs[0].dims())?;
        Ok(vec![inputs[0].clone(), inputs[2].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = sizes(self.name(), io.inputs, io.inputs.get(4))?;
        let lanes = sizes.rank.div_ceil(TILE).next_power_of_two().min(MAX_LANES);
        let chosen = Slot::Input(if self.routed { 4 } else { 0 });
        let each = sizes.tokens_each(self.routed, capabilities);
        let entry = if each == 1 {
            "backward"
        } else {
            "backward_four"
        };
        let mut launch = launch(entry, sizes, self.routed)
            .constant("LANES", lanes as f64)
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .read(5, Slot::Input(3))
            .write(6, Slot::Output(0))
            .write(7, Slot::Output(1));
        if each == 1 {
            launch = launch.read(4, chosen);
        }
        let groups = sizes.tokens.div_ceil(each * WORKGROUP / lanes);
        Ok(launch.folded(groups, capabilities)?.into())
    }

    host_reference!();
}
