//! Two grouped expands into the same rows, `y[t] = base[t] + sum_j W[e(t, j)] z[p] + W2[e(t, j)] z2[p]` with `p = t k + j`: the gradient of
//! rows that two grouped products read.

use crate::device::{Capabilities, Launches, Slot};
use crate::error::{Error, Result};
use crate::host_reference;
use crate::ops::combine::{CombineOperands, CombineSizes};
use crate::ops::expand::{self, Expand};
use crate::ops::segments::{RowOf, expect_segments, gather, host_segments, products, weight_sizes};
use crate::ops::shrink::{self, Shrink};
use crate::ops::subgroup_tile::subgroup_tiles;
use crate::ops::{
    Alias, AliasKind, HostIo, LaunchTypes, Layout, Op, Real, Work, expect_count, expect_f32,
    expect_i32,
};
use crate::tensor::TensorType;

/// Inputs: z `[pairs, in]`, W `[experts, in, out]`, z2 `[pairs, in2]`, W2 `[experts, in2, out]`, experts `[tokens, slots]`, order, offsets,
/// the base if `accumulate`. Output `[tokens, out]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpandPair {
    pub(crate) accumulate: bool,
    pub(crate) none: bool,
}

struct Sizes {
    tokens: usize,
    slots: usize,
    experts: usize,
    out: usize,
    inputs: [usize; 2],
}

impl ExpandPair {
    const BASE: usize = 7;

    fn sizes(&self, inputs: &[TensorType]) -> Result<Sizes> {
        let name = self.name();
        let (experts, out, first) = weight_sizes(name, &inputs[1], Layout::InOut)?;
        let (experts2, out2, second) = weight_sizes(name, &inputs[3], Layout::InOut)?;
        if (experts, out) != (experts2, out2) {
            return Err(Error::shape(
                name,
                format!("weights of {} and {} do not fit", inputs[1], inputs[3]),
            ));
        }
        let pairs = expect_segments(name, &inputs[5], &inputs[6], experts, self.none)?;
        expect_f32(name, "the latents", &inputs[0], &[pairs, first])?;
        expect_f32(name, "the other latents", &inputs[2], &[pairs, second])?;
        let &[tokens, slots] = inputs[4].dims() else {
            return Err(Error::shape(
                name,
                format!("the experts are {}, expected [tokens, slots]", inputs[4]),
            ));
        };
        expect_i32(name, "the experts", &inputs[4], &[tokens, pairs / tokens])?;
        Ok(Sizes {
            tokens,
            slots,
            experts,
            out,
            inputs: [first, second],
        })
    }

    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let types: Vec<TensorType> = (0..Self::BASE)
            .map(|i| io.input_type(i).cloned())
            .collect::<Result<_>>()?;
        let Sizes {
            slots,
            experts,
            out,
            inputs,
            ..
        } = self.sizes(&types)?;
        let segments = host_segments(io.ints(5)?, io.ints(6)?);
        let y = io.floats_out(0)?;
        if !self.accumulate {
            y.fill(R::zero());
        }
        for (which, input) in inputs.into_iter().enumerate() {
            let (z, weight) = (io.floats(2 * which)?, io.floats(2 * which + 1)?);
            let rows = |pairs: &[i32]| gather(z, input, pairs, RowOf::Share(1), |_| R::one());
            let layout = Layout::InOut;
            let parts = products(&segments[..experts], weight, (out, input), layout, rows);
            expand::add_products(y, out, (&segments, &parts), slots, 1, None);
        }
        Ok(())
    }

    /// One of the two as an operation of its own.
    fn one(&self, accumulate: bool) -> Expand {
        Expand {
            layout: Layout::InOut,
            scale: 1.0,
            gated: false,
            accumulate,
            none: self.none,
            rows_per_token: None,
        }
    }
}

impl Op for ExpandPair {
    fn name(&self) -> &'static str {
        "expand_pair"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        let Sizes {
            tokens,
            slots,
            experts,
            out,
            inputs: [first, second],
        } = self.sizes(io.inputs)?;
        let pairs = tokens * slots;
        let used = experts.min(pairs) * out;
        // The order says which expert a pair has.
        Ok(Work::moving(io)
            .reading(1, used * first)
            .reading(3, used * second)
            .reading(4, 0)
            .with_flops(2 * pairs * out * (first + second)))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(
            self.name(),
            inputs,
            Self::BASE + usize::from(self.accumulate),
        )?;
        let Sizes { tokens, out, .. } = self.sizes(inputs)?;
        if self.accumulate {
            expect_f32(self.name(), "the base", &inputs[Self::BASE], &[tokens, out])?;
        }
        Ok(vec![TensorType::f32([tokens, out])])
    }

    fn aliases(&self) -> Vec<Alias> {
        let alias = Alias {
            input: Self::BASE,
            output: 0,
            kind: AliasKind::Accumulate,
        };
        self.accumulate.then_some(alias).into_iter().collect()
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let Sizes {
            tokens,
            slots,
            experts,
            out,
            inputs,
        } = self.sizes(io.inputs)?;
        let fours = out.is_multiple_of(4) && inputs.iter().all(|input| input.is_multiple_of(4));
        let scratch_bytes = (tokens * slots * out) as u64 * 4;
        let fits = scratch_bytes
            <= capabilities
                .max_binding_bytes
                .min(expand::MAX_SCRATCH_BYTES);
        let [order, offsets] = [5, 6].map(Slot::Input);
        if !(subgroup_tiles(capabilities) && fours && fits) {
            let mut launches = Launches::default();
            for (which, input) in inputs.into_iter().enumerate() {
                let sizes = expand::Sizes {
                    tokens,
                    slots,
                    experts,
                    out,
                    input,
                };
                let operands = expand::Operands {
                    z: Slot::Input(2 * which),
                    weight: Slot::Input(2 * which + 1),
                    experts: Slot::Input(4),
                    order,
                    offsets,
                    gates: None,
                    map: None,
                };
                let one = self.one(self.accumulate || which > 0);
                one.add_launches(&mut launches, &sizes, operands, capabilities)?;
            }
            return Ok(launches);
        }
        let mut launches = Launches::default();
        let u = launches.scratch_words(tokens * slots * out);
        let shrink = Shrink {
            layout: Layout::InOut,
            none: self.none,
        };
        let sizes = shrink::Sizes {
            pairs: tokens * slots,
            share: 1,
            experts,
            out,
            input: inputs[0],
        };
        let second = shrink::Second {
            x: Slot::Input(2),
            weight: Slot::Input(3),
            input: inputs[1],
        };
        let operands = [Slot::Input(0), Slot::Input(1), order, offsets];
        launches.launches.push(shrink.by_subgroups(
            &sizes,
            Some(second),
            operands,
            u,
            capabilities,
        )?);
        let sum = CombineSizes {
            tokens,
            rows_per_token: 1,
            slots,
            width: out,
        };
        let operands = CombineOperands {
            u,
            gates: None,
            rows: None,
            unread: order,
            y: Slot::Output(0),
        };
        launches
            .launches
            .push(sum.launch(operands, (1.0, self.accumulate), capabilities)?);
        Ok(launches)
    }

    host_reference!();
}
