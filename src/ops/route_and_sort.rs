//! Routing and the sort of the pairs by expert in one launch, where one workgroup is enough for both.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::Backward;
use crate::host_reference;
use crate::ops::route::RouteForward;
use crate::ops::sort::host_sort;
use crate::ops::sort_block::SortBlock;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Work, shader};
use crate::tensor::TensorType;

const WORKGROUP: usize = 256;
/// The sizes up to which one workgroup routes.
const MOST_TOKENS: usize = 4096;
const MOST_EXPERTS: usize = 64;

/// Operands as [`RouteForward`]'s. Results experts, gates, norms as there, then order and offsets of the pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RouteAndSort {
    forward: RouteForward,
    block: SortBlock,
}

impl RouteAndSort {
    /// `None` if one workgroup is not enough: beyond 4,096 tokens or 64 experts, or if the pairs are too many to be sorted by one
    /// ([`SortBlock::of_all`]).
    pub(crate) fn new(forward: RouteForward, [tokens, experts]: [usize; 2]) -> Option<Self> {
        if tokens > MOST_TOKENS || experts > MOST_EXPERTS {
            return None;
        }
        // What is no choice of experts is refused as an operation's operand is, not here.
        let pairs = tokens * forward.route.top_k.clamp(1, MOST_EXPERTS);
        let block = SortBlock::of_all(experts, pairs)?;
        Some(Self { forward, block })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let chosen = self.forward.host_route(&mut io)?;
        let (order, offsets) = (io.ints_out(3)?, io.ints_out(4)?);
        host_sort(chosen, self.block.digits, order, offsets);
        Ok(())
    }
}

impl Op for RouteAndSort {
    fn name(&self) -> &'static str {
        "route_and_sort"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        self.forward.work(io)
    }

    fn keeps_f32(&self, output: usize) -> bool {
        self.forward.keeps_f32(output)
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let mut outputs = self.forward.outputs(inputs)?;
        outputs.extend([
            TensorType::i32([outputs[0].elements()]),
            TensorType::i32([self.block.digits + 1]),
        ]);
        Ok(outputs)
    }

    fn differentiable(&self, input: usize) -> bool {
        self.forward.differentiable(input)
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        self.forward.backward(context)
    }

    fn launches(&self, io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Launches> {
        let RouteForward { route, biased } = self.forward;
        let SortBlock {
            digits,
            chunks,
            share,
        } = self.block;
        let launch = Launch::new(
            shader!("route_and_sort", "route_token", "sort_block"),
            "forward",
        )
        .constant("WORKGROUP", WORKGROUP as f64)
        .constant("CELLS", self.block.cells() as f64);
        let tokens = io.inputs[0].shape.rows();
        let launch = route
            .with_settings(launch, [tokens, digits], biased)
            .param(io.outputs[0].elements())
            .param(digits)
            .param(chunks)
            .param(share)
            .read(1, Slot::Input(0))
            // Without a bias the binding is not read: any buffer will do.
            .read(2, Slot::Input(usize::from(biased)))
            .write(3, Slot::Output(0))
            .write(4, Slot::Output(1))
            .write(5, Slot::Output(2))
            .write(6, Slot::Output(3))
            .write(7, Slot::Output(4));
        Ok(launch.into())
    }

    host_reference!();
}
