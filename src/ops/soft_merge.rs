//! CoMoL's dense core routing in rank space (section 5 of the mathematics): the logits of a router that looks at the latents, their softmax,
//! and the soft merge by it, in one kernel; backward, the gradients of all three in another.

use rayon::prelude::*;

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::core_gradient::CoreGradient;
use crate::ops::host::max_and_sum;
use crate::ops::mix_cores::{self, Sizes, TILE};
use crate::ops::softmax;
use crate::ops::{
    Alias, AliasKind, CoreMix, HostIo, LaunchTypes, MatMul, Op, Real, Work, dims_f32, expect_count,
    expect_f32, shader,
};
use crate::tensor::{Tensor, TensorType};

/// The most experts whose gates the kernels hold: at rank 4 or less a workgroup of 8 has 32 tokens, and the gates of these take 8 KiB.
const MAX_EXPERTS: usize = 64;
/// The largest rank: 16 invocations have 4 elements of a token each.
const MAX_RANK: usize = 64;
/// What the gates of a workgroup's tokens may take of its memory; the parts of their gradients take up to 8 KiB more.
const MAX_BYTES: usize = 8192;
/// The least elements that the memory for gates has.
const LEAST_PLACES: usize = 256;

/// Inputs: z `[tokens, rank]`, core `[experts, rank, rank]`, router `[experts, rank]`. Outputs: logits and gates, `[tokens, experts]`, u
/// `[tokens, rank]`.
#[derive(Clone, Copy, Debug)]
struct SoftMerge {
    mix: CoreMix,
}

/// Inputs: z, core, router, the gates, du; then the gradients of the gates and of the logits from outside, each if there is one. Outputs: dz,
/// the gradient of the logits.
#[derive(Clone, Copy, Debug)]
struct SoftMergeBackward {
    gates: bool,
    logits: bool,
}

/// Whether one kernel holds so many experts of such a rank. Beyond that the logits, the softmax and the mixture are operations of their own:
/// CoMoL's published layers have rank 16 and up to 64 experts.
fn fits(experts: usize, rank: usize) -> bool {
    experts <= MAX_EXPERTS && rank <= MAX_RANK
}

impl Graph {
    /// Soft merging with core routing (arXiv 2603.00573): `[logits, gates, u]` with `logits = z routerᵀ` and gates their softmax, both
    /// `[tokens, experts]`, and `u[t] = sum over the experts e of gates[t, e] M[e]ᵀ z[t]`, `[tokens, rank]`. `z` is `[tokens, rank]`, `core`
    /// `[experts, rank, rank]`, `router` `[experts, rank]`. Logits and gates are kept in f32. Up to 64 experts and rank 64 that is one
    /// operation, else [`Graph::matmul_nt`], [`Graph::softmax`] and [`Graph::mix_cores`].
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn soft_merge(
        &mut self,
        z: Value,
        core: Value,
        router: Value,
        mix: CoreMix,
    ) -> Result<[Value; 3]> {
        let types = [z, core, router].map(|value| self.ty(value).cloned());
        let [z_type, core_type, router_type] = types;
        let sizes = sizes("soft_merge", &[z_type?, core_type?, router_type?])?;
        if fits(sizes.experts, sizes.rank) {
            let outputs = self.apply(SoftMerge { mix }, &[z, core, router])?;
            return Ok([outputs[0], outputs[1], outputs[2]]);
        }
        let (logits, gates) = self.in_f32(|graph| {
            let logits = graph.matmul_nt(z, router)?;
            Ok::<_, Error>((logits, graph.softmax(logits)?))
        })?;
        Ok([logits, gates, self.mix_cores(z, core, gates, mix)?])
    }
}

/// Checks z, core and router.
fn sizes(op: &'static str, inputs: &[TensorType]) -> Result<Sizes> {
    let [tokens, rank] = dims_f32(op, "the latents", &inputs[0])?;
    let [experts, ..] = dims_f32::<3>(op, "the core matrices", &inputs[1])?;
    expect_f32(op, "the core matrices", &inputs[1], &[experts, rank, rank])?;
    expect_f32(op, "the router", &inputs[2], &[experts, rank])?;
    Ok(Sizes {
        tokens,
        slots: experts,
        experts,
        rank,
    })
}

/// What of a workgroup is whose.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Invocations.
    workgroup: usize,
    /// Invocations that share a token, or a group of four.
    lanes: usize,
    /// Tokens that they have: 1 or 4.
    each: usize,
    /// Elements of the memory for gates, each of as many tokens.
    places: usize,
}

fn tile(sizes: Sizes, capabilities: &Capabilities) -> Tile {
    let lanes = sizes.rank.div_ceil(TILE).next_power_of_two();
    let each = sizes.tokens_each(false, capabilities);
    // A software driver runs a workgroup of more than its 8 lanes as coroutines, between which it switches at each barrier.
    let most = match capabilities.class {
        AdapterClass::Software => 8,
        _ => 64,
    };
    let places = |workgroup: usize| workgroup / lanes * sizes.experts;
    let mut workgroup = lanes.max(most);
    while workgroup > lanes.max(8) && 4 * places(workgroup) * each > MAX_BYTES {
        workgroup /= 2;
    }
    Tile {
        workgroup,
        lanes,
        each,
        // Few different sizes make few different pipelines.
        places: places(workgroup).next_power_of_two().max(LEAST_PLACES),
    }
}

fn launch(entry: &'static str, sizes: Sizes, tile: Tile) -> Launch {
    Launch::new(shader!("soft_merge", "core_mixture"), entry)
        .constant("WORKGROUP", tile.workgroup as f64)
        .constant("LANES", tile.lanes as f64)
        .constant("PLACES", tile.places as f64)
        .constant("ALIGNED", sizes.rank.is_multiple_of(TILE))
        .read(1, Slot::Input(0))
        .read(2, Slot::Input(1))
        .read(3, Slot::Input(2))
        .param(sizes.tokens)
        .param(sizes.slots)
        .param(sizes.experts)
        .param(sizes.rank)
}

fn groups(sizes: Sizes, tile: Tile) -> usize {
    sizes
        .tokens
        .div_ceil(tile.each * tile.workgroup / tile.lanes)
}

impl SoftMerge {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let (z, core, router) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let experts = router.len() / rank;
        let merges = self.mix.merges(experts, rank);
        let (logits, gates, u) = (io.floats_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        let rows = z
            .par_chunks(rank)
            .zip(logits.par_chunks_mut(experts))
            .zip(gates.par_chunks_mut(experts))
            .zip(u.par_chunks_mut(rank));
        rows.for_each(|(((z, logits), gates), u)| {
            for (logit, row) in logits.iter_mut().zip(router.chunks(rank)) {
                *logit = row.iter().zip(z).map(|(&r, &z)| r * z).sum();
            }
            let (max, sum) = max_and_sum(logits);
            for (gate, &logit) in gates.iter_mut().zip(&*logits) {
                *gate = (logit - max).exp() / sum;
            }
            let matrices = core.chunks_exact(rank * rank).enumerate();
            mix_cores::mix(u, z, gates, matrices, merges);
        });
        Ok(())
    }
}

impl Op for SoftMerge {
    fn name(&self) -> &'static str {
        "soft_merge"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            experts,
            rank,
            ..
        } = sizes(self.name(), io.inputs)?;
        // The logits; the softmax's difference to the maximum, exp, sum and division; the mixture.
        let each = 2 * rank + 4 + 2 * rank * rank + rank;
        Ok(Work::moving(io).with_flops(tokens * experts * each))
    }

    fn keeps_f32(&self, output: usize) -> bool {
        output < 2
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let sizes = sizes(self.name(), inputs)?;
        if !fits(sizes.experts, sizes.rank) {
            return Err(Error::shape(
                self.name(),
                format!(
                    "{} experts of rank {}, the most are {MAX_EXPERTS} of {MAX_RANK}",
                    sizes.experts, sizes.rank
                ),
            ));
        }
        let gates = TensorType::f32([sizes.tokens, sizes.experts]);
        Ok(vec![gates.clone(), gates, inputs[0].clone()])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let [z, core, router] = [0, 1, 2].map(|input| context.input(input));
        let gates = context.output(1);
        let [outer_logits, outer_gates, given] = [0, 1, 2].map(|output| context.gradient(output));
        let du = match given {
            Some(du) => du,
            // Only the gates or the logits are used: nothing comes back through the mixture.
            None => {
                let zeros = Tensor::zeros(context.graph.ty(z)?);
                context.graph.constant(zeros)?
            }
        };
        let op = SoftMergeBackward {
            gates: outer_gates.is_some(),
            logits: outer_logits.is_some(),
        };
        let outer = outer_gates.into_iter().chain(outer_logits);
        let inputs: Vec<Value> = [z, core, router, gates, du]
            .into_iter()
            .chain(outer)
            .collect();
        let gradients = context.graph.apply(op, &inputs)?;
        let (dz, d_logits) = (gradients[0], gradients[1]);
        if context.wants(0) {
            context.add(0, dz)?;
        }
        if context.wants(1) && given.is_some() {
            let router = context.wants(2);
            let inputs = [z, du, gates, d_logits];
            let count = 3 + usize::from(router);
            let gradients = context
                .graph
                .apply(CoreGradient { router }, &inputs[..count])?;
            for (input, &gradient) in (1..).zip(&gradients) {
                context.add(input, gradient)?;
            }
        } else if context.wants(2) {
            let options = MatMul {
                transpose_a: true,
                ..MatMul::default()
            };
            context.accumulate(2, |graph, sum| graph.matmul_with(d_logits, z, options, sum))?;
        }
        Ok(())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = sizes(self.name(), io.inputs)?;
        let tile = tile(sizes, capabilities);
        let entry = match (self.mix.merges(sizes.experts, sizes.rank), tile.each) {
            (true, 1) => "merge",
            (true, _) => "merge_four",
            (false, 1) => "apply",
            (false, _) => "apply_four",
        };
        Ok(launch(entry, sizes, tile)
            .write(7, Slot::Output(0))
            .write(8, Slot::Output(1))
            .write(9, Slot::Output(2))
            .folded(groups(sizes, tile), capabilities)?
            .into())
    }

    host_reference!();
}

impl SoftMergeBackward {
    /// How many inputs there are; the last is the gradient of the logits from outside, if there is one.
    fn count(&self) -> usize {
        5 + usize::from(self.gates) + usize::from(self.logits)
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let experts = io.input_type(3)?.shape.last();
        let (z, core, router) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let (gates, du) = (io.floats(3)?, io.floats(4)?);
        let outer_gates = if self.gates {
            Some(io.floats(5)?)
        } else {
            None
        };
        let (dz, d_logits) = (io.floats_out(0)?, io.floats_out(1)?);
        let rows = dz
            .par_chunks_mut(rank)
            .zip(d_logits.par_chunks_mut(experts))
            .zip(z.par_chunks(rank).zip(du.par_chunks(rank)))
            .zip(gates.par_chunks(experts))
            .enumerate();
        rows.for_each(|(token, (((dz, d_logits), (z, du)), gates))| {
            let mut d_gates = match outer_gates {
                Some(outer) => outer[token * experts..][..experts].to_vec(),
                None => vec![R::zero(); experts],
            };
            let matrices = core.chunks_exact(rank * rank).enumerate();
            dz.fill(R::zero());
            mix_cores::mix_gradient(dz, &mut d_gates, (z, du), gates, matrices);
            let own = softmax::row_gradient(gates, &d_gates);
            for ((d_logit, own), row) in d_logits.iter_mut().zip(own).zip(router.chunks(rank)) {
                *d_logit = if self.logits { *d_logit + own } else { own };
                for (dz, &r) in dz.iter_mut().zip(row) {
                    *dz += *d_logit * r;
                }
            }
        });
        Ok(())
    }
}

impl Op for SoftMergeBackward {
    fn name(&self) -> &'static str {
        "soft_merge_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            experts,
            rank,
            ..
        } = sizes(self.name(), io.inputs)?;
        // M du, its multiple added to dz, its product with z; the softmax's sum, difference and product; dlogits R.
        let each = 2 * rank * rank + 4 * rank + 4 + 2 * rank;
        let outer = tokens * experts * (usize::from(self.gates) + usize::from(self.logits));
        Ok(Work::moving(io).with_flops(tokens * experts * each + outer))
    }

    fn keeps_f32(&self, output: usize) -> bool {
        output == 1
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, self.count())?;
        let sizes = sizes(self.name(), inputs)?;
        let gates = [sizes.tokens, sizes.experts];
        expect_f32(self.name(), "the gates", &inputs[3], &gates)?;
        expect_f32(self.name(), "du", &inputs[4], inputs[0].dims())?;
        for outer in &inputs[5..] {
            expect_f32(self.name(), "a gradient from outside", outer, &gates)?;
        }
        Ok(vec![inputs[0].clone(), inputs[3].clone()])
    }

    fn aliases(&self) -> Vec<Alias> {
        if !self.logits {
            return Vec::new();
        }
        vec![Alias {
            input: self.count() - 1,
            output: 1,
            kind: AliasKind::Accumulate,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let sizes = sizes(self.name(), io.inputs)?;
        let tile = tile(sizes, capabilities);
        let entry = if tile.each == 1 {
            "backward"
        } else {
            "backward_four"
        };
        // Where the gates have no gradient from outside, the binding is not read: any buffer will do.
        let outer_gates = if self.gates { 5 } else { 3 };
        Ok(launch(entry, sizes, tile)
            .constant("OUTER_GATES", self.gates)
            .constant("OUTER_LOGITS", self.logits)
            .read(4, Slot::Input(3))
            .read(5, Slot::Input(4))
            .read(6, Slot::Input(outer_gates))
            .write(7, Slot::Output(1))
            .write(9, Slot::Output(0))
            .folded(groups(sizes, tile), capabilities)?
            .into())
    }

    host_reference!();
}
