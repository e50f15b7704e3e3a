//! The gradient of CoMoL's core matrices under a dense gate, `dM[e] = sum_t g[t, e] z[t] du[t]ᵀ`, and that of a router which looks at the
//! latents, `dR[e] = sum_t dlogits[t, e] z[t]`: one kernel, without atomics. Under a top-k gate the cores' is
//! [`SegmentOuter`](super::segment_outer::SegmentOuter)'s sum over the pairs of each expert.

use rayon::prelude::*;

use crate::device::{AdapterClass, Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::host_reference;
use crate::ops::host_gemm::{Matrix, gemm};
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, dims_f32, expect_count, expect_f32, shader};
use crate::tensor::TensorType;

/// Rows and columns that one invocation computes, as in `shaders/core_gradient.wgsl`.
const TILE: usize = 4;
/// An invocation that shares a tile has at least so many tokens: fewer cost more to add up than they save.
const LEAST_TOKENS: usize = 8;

/// Invocations of a workgroup, and how many of them share a tile: as many as give the device enough to do. A software driver has as many
/// invocations at work as the CPU has lanes.
fn tile_lanes(tiles: usize, tokens: usize, class: AdapterClass) -> (usize, usize) {
    let (choices, enough): (&[usize], usize) = match class {
        AdapterClass::Software => (&[8], 512),
        _ => (&[256, 32, 4], 65_536),
    };
    let fits = |&lanes: &usize| tiles * lanes <= enough && tokens >= LEAST_TOKENS * lanes;
    let lanes = choices.iter().copied().find(fits).unwrap_or(1);
    let workgroup = match class {
        AdapterClass::Software => 8,
        _ => lanes.max(64),
    };
    (workgroup, lanes)
}

/// Inputs: z `[tokens, rank]`, du `[tokens, rank]`, gates `[tokens, experts]`; if `router` the gradient of the logits
/// `[tokens, experts]`. Outputs: `[experts, rank, rank]`; if `router` `[experts, rank]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoreGradient {
    pub(crate) router: bool,
}

impl CoreGradient {
    /// Tokens, experts and rank.
    fn sizes(&self, inputs: &[TensorType]) -> Result<[usize; 3]> {
        let [tokens, rank] = dims_f32(self.name(), "the latents", &inputs[0])?;
        expect_f32(self.name(), "du", &inputs[1], &[tokens, rank])?;
        let [_, experts] = dims_f32(self.name(), "the gates", &inputs[2])?;
        expect_f32(self.name(), "the gates", &inputs[2], &[tokens, experts])?;
        if self.router {
            let name = "the gradient of the logits";
            expect_f32(self.name(), name, &inputs[3], &[tokens, experts])?;
        }
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
        if self.router {
            let left = Matrix::new(io.floats(3)?, tokens, experts).transposed_if(true);
            let right = Matrix::new(z, tokens, rank);
            gemm(io.floats_out(1)?, left, right, R::one(), false, true);
        }
        Ok(())
    }
}

impl Op for CoreGradient {
    fn name(&self) -> &'static str {
        "core_gradient"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let [tokens, experts, rank] = self.sizes(io.inputs)?;
        let router = if self.router { 2 * rank } else { 0 };
        Ok(Work::moving(io).with_flops(tokens * experts * (2 * rank * rank + rank + router)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3 + usize::from(self.router))?;
        let [_, experts, rank] = self.sizes(inputs)?;
        let core = TensorType::f32([experts, rank, rank]);
        let router = self.router.then(|| TensorType::f32([experts, rank]));
        Ok([core].into_iter().chain(router).collect())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts, rank] = self.sizes(io.inputs)?;
        let blocks = rank.div_ceil(TILE);
        let of_router = if self.router {
            experts.div_ceil(TILE) * blocks
        } else {
            0
        };
        let tiles = experts * blocks * blocks + of_router;
        let (workgroup, lanes) = tile_lanes(tiles, tokens, capabilities.class);
        let entry = if self.router {
            "with_router"
        } else {
            "core_only"
        };
        let mut launch = Launch::new(shader!("core_gradient"), entry)
            .constant("WORKGROUP", workgroup as f64)
            .constant("LANES", lanes as f64)
            .constant("ALIGNED", rank.is_multiple_of(TILE))
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(3, Slot::Input(2))
            .write(5, Slot::Output(0))
            .param(tokens)
            .param(experts)
            .param(rank)
            .param(blocks);
        if self.router {
            launch = launch.read(4, Slot::Input(3)).write(6, Slot::Output(1));
        }
        let groups = tiles.div_ceil(workgroup / lanes);
        Ok(launch.folded(groups, capabilities)?.into())
    }

    host_reference!();
}
