//! The gradient of CoMoL's core matrices under a dense gate, `dM[e] = sum_t g[t, e] z[t] du[t]ᵀ`: in chunks of tokens, without
//! atomics. Under a top-k gate it is [`SegmentOuter`](super::segment_outer::SegmentOuter)'s sum over the pairs of each expert.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32, shader};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;
/// Rows and columns that one invocation computes, as in `shaders/core_gradient.wgsl`.
const TILE: usize = 4;
/// Tokens are split into chunks until there are about so many invocations; the partial sums then take 1 MiB at most.
const ENOUGH_INVOCATIONS: usize = 16_384;
/// A chunk has at least so many tokens: fewer cost more to add up than they save.
const LEAST_CHUNK: usize = 16;

/// Inputs: z `[tokens, rank]`, du `[tokens, rank]`, gates `[tokens, experts]`. Output `[experts, rank, rank]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoreGradient;

impl CoreGradient {
    /// Tokens, experts and rank.
    fn sizes(&self, inputs: &[TensorType]) -> Result<[usize; 3]> {
        let [tokens, rank] = dims_f32(self.name(), "the latents", &inputs[0])?;
        expect_f32(self.name(), "du", &inputs[1], &[tokens, rank])?;
        let [_, experts] = dims_f32(self.name(), "the gates", &inputs[2])?;
        expect_f32(self.name(), "the gates", &inputs[2], &[tokens, experts])?;
        Ok([tokens, experts, rank])
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let rank = io.input_type(0)?.shape.last();
        let experts = io.input_type(2)?.shape.last();
        let (z, du, gates) = (io.floats(0)?, io.floats(1)?, io.floats(2)?);
        let tokens = z.len() / rank;
        let out = io.floats_out(0)?.par_chunks_mut(rank * rank).enumerate();
        out.for_each(|(expert, out)| {
            let gated: Vec<R> = z
                .chunks(rank)
                .enumerate()
                .flat_map(|(token, z)| z.iter().map(move |&z| gates[token * experts + expert] * z))
                .collect();
            let left = Matrix::new(&gated, tokens, rank).transposed_if(true);
            let right = Matrix::new(du, tokens, rank);
            gemm(out, left, right, R::one(), false, false);
        });
        Ok(())
    }
}

impl Op for CoreGradient {
    fn name(&self) -> &'static str {
        "core_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [tokens, experts, rank] = self.sizes(io.inputs)?;
        Ok(Work::moving(io).with_flops(tokens * experts * (2 * rank * rank + rank)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [_, experts, rank] = self.sizes(inputs)?;
        Ok(vec![TensorType::f32([experts, rank, rank])])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts, rank] = self.sizes(io.inputs)?;
        let blocks = rank.div_ceil(TILE);
        let tiles = experts * blocks * blocks;
        let wanted = (ENOUGH_INVOCATIONS / tiles).clamp(1, tokens.div_ceil(LEAST_CHUNK));
        let chunk = tokens.div_ceil(wanted);
        let chunks = tokens.div_ceil(chunk);
        let elements = experts * rank * rank;
        let launch = |entry, groups| {
            Launch::new(shader!("core_gradient"), entry)
                .param(tokens)
                .param(experts)
                .param(rank)
                .param(blocks)
                .param(chunk)
                .param(chunks)
                .folded(groups, capabilities)
        };
        let mut launches = Launches::default();
        let sums = if chunks == 1 {
            Slot::Output(0)
        } else {
            launches.scratch_words(chunks * elements)
        };
        launches.launches.push(
            launch("chunk", (chunks * tiles).div_ceil(WORKGROUP))?
                .constant("ALIGNED", rank.is_multiple_of(4))
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .read(3, Slot::Input(2))
                .write(5, sums),
        );
        if chunks > 1 {
            launches.launches.push(
                launch("total", elements.div_ceil(WORKGROUP))?
                    .read(4, sums)
                    .write(5, Slot::Output(0)),
            );
        }
        Ok(launches)
    }

    host_reference!();
}
