//! Which groups of experts each token uses: experts of one group share a latent projection, which is computed once for each
//! token and active group rather than once for each expert.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::host_reference;
use crate::ops::{HostIo, LaunchTypes, Op, Real, Segments, expect_count, shader};
use crate::tensor::{DType, TensorType};

const WORKGROUP: usize = 64;

/// The groups of experts that are active for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActiveGroups {
    /// The distinct groups of each token's experts, `i32 [tokens, per_token]`, sorted by group; the number of groups stands for none.
    pub segments: Segments,
    pub(crate) per_token: usize,
    pub(crate) rows: Value,
}

impl ActiveGroups {
    /// How many groups a token can use: the smaller of its experts and the groups there are.
    #[must_use]
    pub fn per_token(&self) -> usize {
        self.per_token
    }

    /// `i32 [tokens, top_k]`: the row, of `tokens * per_token`, that belongs to the group of each pair's expert; one past the last
    /// for a pair that belongs to no expert.
    #[must_use]
    pub fn rows(&self) -> Value {
        self.rows
    }
}

/// Operand experts `[tokens, slots]`. Results groups `[tokens, per_token]`, rows `[tokens, slots]`.
#[derive(Clone, Copy, Debug)]
struct FindGroups {
    experts: usize,
    groups: usize,
}

impl Graph {
    /// The groups that the chosen experts belong to: expert e of `experts` to group `e / (experts / groups)`, in the order in which
    /// they first appear among a token's choices. `segments` are of experts chosen as `[tokens, top_k]`.
    ///
    /// # Errors
    /// [`Error::Setting`] if the groups do not divide the experts, [`Error::Shape`] if the experts chosen are not a matrix, or not of as
    /// many experts.
    pub fn active_groups(
        &mut self,
        segments: Segments,
        experts: usize,
        groups: usize,
    ) -> Result<ActiveGroups> {
        let segment_count = self.ty(segments.offsets)?.elements() - 1;
        if segment_count != experts + usize::from(segments.none) {
            return Err(Error::shape(
                "active_groups",
                format!(
                    "the segments are of {} experts, expected {experts}",
                    segment_count - usize::from(segments.none)
                ),
            ));
        }
        let outputs = self.apply(FindGroups { experts, groups }, &[segments.experts])?;
        Ok(ActiveGroups {
            per_token: self.ty(outputs[0])?.shape.last(),
            segments: self.segments_with_none(outputs[0], groups)?,
            rows: outputs[1],
        })
    }
}

/// That the groups are of equal size.
pub(crate) fn check_groups(experts: usize, groups: usize) -> Result<()> {
    if groups == 0 || !experts.is_multiple_of(groups) || experts == 0 {
        return Err(Error::setting(
            "groups",
            groups,
            format!("must divide the {experts} experts"),
        ));
    }
    Ok(())
}

impl FindGroups {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let slots = io.input_type(0)?.shape.last();
        let experts = io.ints(0)?;
        let (groups, rows) = (io.ints_out(0)?, io.ints_out(1)?);
        let per_token = slots.min(self.groups);
        let none = groups.len() as i32;
        let per_group = self.experts / self.groups;
        groups.fill(self.groups as i32);
        let tokens = experts
            .chunks(slots)
            .zip(groups.chunks_mut(per_token))
            .zip(rows.chunks_mut(slots));
        for (token, ((experts, groups), rows)) in tokens.enumerate() {
            let mut found = 0;
            for (&expert, row) in experts.iter().zip(rows) {
                if expert as usize >= self.experts {
                    *row = none;
                    continue;
                }
                let group = expert / per_group as i32;
                let position = groups[..found]
                    .iter()
                    .position(|&other| other == group)
                    .unwrap_or_else(|| {
                        groups[found] = group;
                        found += 1;
                        found - 1
                    });
                *row = (token * per_token + position) as i32;
            }
        }
        Ok(())
    }
}

impl Op for FindGroups {
    fn name(&self) -> &'static str {
        "active_groups"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 1)?;
        check_groups(self.experts, self.groups)?;
        match *inputs[0].dims() {
            [tokens, slots] if inputs[0].dtype == DType::I32 => Ok(vec![
                TensorType::i32([tokens, slots.min(self.groups)]),
                TensorType::i32([tokens, slots]),
            ]),
            _ => Err(Error::shape(
                self.name(),
                format!(
                    "the experts chosen are {}, expected i32[tokens, k]",
                    inputs[0]
                ),
            )),
        }
    }

    fn differentiable(&self, _input: usize) -> bool {
        false
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let (slots, per_token) = (io.inputs[0].shape.last(), io.outputs[0].shape.last());
        let tokens = io.inputs[0].elements() / slots;
        let launch = Launch::new(shader!("active_groups"), "forward")
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .write(3, Slot::Output(1))
            .param(tokens)
            .param(slots)
            .param(self.experts)
            .param(self.experts / self.groups)
            .param(self.groups)
            .param(per_token)
            .folded(tokens.div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
