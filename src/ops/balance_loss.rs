//! The load-balancing loss of a router.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::{Error, Result};
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::host_sum::total_of;
use crate::ops::{
    HostIo, IndexRange, LaunchTypes, Op, Real, TOTAL_WORKGROUP, Work, dims_f32, expect_count,
    expect_f32, row_workgroup, shader,
};
use crate::tensor::{DType, TensorType};

/// More choices than that are counted by a large workgroup on software drivers too: llvmpipe leaves a kernel's loops after 65,536 turns in all,
/// without a word.
const LONG: usize = 1 << 16;

/// The two forms of the load-balancing loss in use: one is `top_k` times the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceForm {
    /// Switch's and Megatron's: f is the fraction of all choices, so that the loss is 1 at perfect balance.
    #[default]
    Switch,
    /// Hugging Face's `load_balancing_loss_func`: f is the mean number of a token's choices that fall on the expert, so that the loss is
    /// `top_k` at perfect balance. Coefficients in model configurations of that library are for this form.
    HuggingFace,
}

/// What [`Graph::balance_loss`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalanceLoss {
    /// The loss, a scalar: in Switch's form 1 at perfect balance, at most the number of experts.
    pub loss: Value,
    /// The fraction of all choices that fell on each expert, `[experts]`; it sums to 1. No gradient flows through it.
    pub load: Value,
}

/// Results: the loss and the load.
#[derive(Clone, Copy, Debug)]
struct Balance(BalanceForm);

/// Operands logits, load, dloss. The loss is so many times Switch's.
#[derive(Clone, Copy, Debug)]
struct BalanceBackward {
    factor: usize,
}

impl BalanceForm {
    /// How many times Switch's loss it is, for tokens of `top_k` choices.
    fn factor(self, top_k: usize) -> usize {
        match self {
            Self::Switch => 1,
            Self::HuggingFace => top_k,
        }
    }
}

impl Graph {
    /// `E sum_e f_e P_e` with `f_e` the fraction of the choices that fell on expert e and `P_e` the mean over the tokens of
    /// `softmax(logits)_e`: the auxiliary loss of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6),
    /// for k choices a token divided by k as in Megatron, so that it is 1 at perfect balance whatever k.
    ///
    /// `logits` is `[tokens, experts]`, `experts` are integers `[tokens, k]`: the experts chosen for each token.
    /// Choices that the host writes are checked against `0..experts`; of those that an operation computes, one that is no
    /// expert counts for none.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operands have other shapes or types.
    pub fn balance_loss(&mut self, logits: Value, experts: Value) -> Result<BalanceLoss> {
        self.balance_loss_with(logits, experts, BalanceForm::Switch)
    }

    /// [`Graph::balance_loss`] in either form.
    ///
    /// # Errors
    /// As [`Graph::balance_loss`].
    pub fn balance_loss_with(
        &mut self,
        logits: Value,
        experts: Value,
        form: BalanceForm,
    ) -> Result<BalanceLoss> {
        let outputs = self.apply(Balance(form), &[logits, experts])?;
        Ok(BalanceLoss {
            loss: outputs[0],
            load: outputs[1],
        })
    }
}

/// A launch with the bindings still to be named; all entry points share one set of parameters.
fn launch(
    entry: &'static str,
    [tokens, experts]: [usize; 2],
    choices: usize,
    factor: usize,
) -> Launch {
    Launch::new(shader!("balance_loss", "reduce", "soft_max"), entry)
        .param(tokens)
        .param(experts)
        .param(choices)
        .param(((experts * factor) as f64 / tokens as f64) as f32)
}

/// sum_e f_e p_e of one token, with the maximum of its logits and the sum of their exponentials.
fn mix<R: Real>(logits: &[R], load: &[R]) -> (R, R, R) {
    let (max, sum) = max_and_sum(logits);
    let mixed: R = logits
        .iter()
        .zip(load)
        .map(|(&logit, &f)| f * (logit - max).exp())
        .sum();
    (mixed / sum, max, sum)
}

impl Balance {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, chosen) = (io.floats(0)?, io.ints(1)?);
        let (loss, load) = (io.floats_out(0)?, io.floats_out(1)?);
        let experts = load.len();
        let mut hits = vec![0_usize; experts];
        for &expert in chosen {
            if let Some(hits) = usize::try_from(expert)
                .ok()
                .and_then(|expert| hits.get_mut(expert))
            {
                *hits += 1;
            }
        }
        for (load, &hits) in load.iter_mut().zip(&hits) {
            *load = R::of(hits as f64) / R::of(chosen.len() as f64);
        }
        let load = &*load;
        // Collected before they are added up, so that the order of the additions does not depend on the threads.
        let mixed: Vec<R> = logits
            .par_chunks_exact(experts)
            .map(|logits| mix(logits, load).0)
            .collect();
        let factor = self.0.factor(io.input_type(1)?.shape.last());
        let scale = R::of((experts * factor) as f64 / mixed.len() as f64);
        loss[0] = scale * total_of(&mixed, |mixed| mixed);
        Ok(())
    }
}

impl Op for Balance {
    fn name(&self) -> &'static str {
        "balance_loss"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // A softmax and its product with the load.
        Ok(Work::moving(io).with_flops(5 * io.inputs[0].elements()))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [tokens, experts] = dims_f32(self.name(), "the logits", &inputs[0])?;
        match *inputs[1].dims() {
            [rows, _] if rows == tokens && inputs[1].dtype == DType::I32 => {}
            _ => {
                let reason = format!(
                    "the experts chosen are {}, expected i32[{tokens}, k]",
                    inputs[1]
                );
                return Err(Error::shape(self.name(), reason));
            }
        }
        Ok(vec![TensorType::f32([]), TensorType::f32([experts])])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        // What arrives at the load stops there: counts have no gradient.
        let Some(dloss) = context.gradient(0) else {
            return Ok(());
        };
        let (logits, load) = (context.input(0), context.output(1));
        let top_k = context.graph.ty(context.input(1))?.shape.last();
        let factor = self.0.factor(top_k);
        let dlogits = context
            .graph
            .apply1(BalanceBackward { factor }, &[logits, load, dloss])?;
        context.add(0, dlogits)
    }

    fn index_ranges(&self, inputs: &[TensorType]) -> Vec<IndexRange> {
        vec![IndexRange {
            input: 1,
            limit: inputs[0].shape.last(),
            ignored: None,
        }]
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let choices = io.inputs[1].elements();
        let factor = self.0.factor(io.inputs[1].shape.last());
        let launch = |entry| launch(entry, [tokens, experts], choices, factor);
        let mut launches = Launches::default();
        let mixed = launches.scratch_words(tokens);
        let workgroup = if choices > LONG {
            TOTAL_WORKGROUP
        } else {
            row_workgroup(choices, capabilities)
        };
        launches.launches.push(
            launch("load")
                .constant("WORKGROUP", workgroup)
                .read(2, Slot::Input(1))
                .write(3, Slot::Output(1))
                .folded(experts, capabilities)?,
        );
        launches.launches.push(
            launch("row")
                .constant("WORKGROUP", row_workgroup(experts, capabilities))
                .read(1, Slot::Input(0))
                .read(4, Slot::Output(1))
                .write(5, mixed)
                .folded(tokens, capabilities)?,
        );
        launches.launches.push(
            launch("total")
                .constant("WORKGROUP", TOTAL_WORKGROUP)
                .write(5, mixed)
                .write(7, Slot::Output(0))
                .folded(1, capabilities)?,
        );
        Ok(launches)
    }

    host_reference!();
}

impl BalanceBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, load, dloss) = (io.floats(0)?, io.floats(1)?, io.floats(2)?[0]);
        let experts = load.len();
        let tokens = logits.len() / experts;
        let scale = dloss * R::of((experts * self.factor) as f64 / tokens as f64);
        let dlogits = io.floats_out(0)?;
        dlogits
            .par_chunks_exact_mut(experts)
            .zip(logits.par_chunks_exact(experts))
            .for_each(|(dlogits, logits)| {
                let (mixed, max, sum) = mix(logits, load);
                for ((dlogit, &logit), &f) in dlogits.iter_mut().zip(logits).zip(load) {
                    *dlogit = scale * ((logit - max).exp() / sum) * (f - mixed);
                }
            });
        Ok(())
    }
}

impl Op for BalanceBackward {
    fn name(&self) -> &'static str {
        "balance_loss_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // A softmax, its product with the load, a difference, a product.
        Ok(Work::moving(io).with_flops(8 * io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 3)?;
        let [_, experts] = dims_f32(self.name(), "the logits", &inputs[0])?;
        expect_f32(self.name(), "the load", &inputs[1], &[experts])?;
        expect_f32(self.name(), "dloss", &inputs[2], &[])?;
        Ok(vec![inputs[0].clone()])
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [tokens, experts] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        // The choices matter to the load alone.
        let launch = launch("backward", [tokens, experts], 0, self.factor)
            .constant("WORKGROUP", row_workgroup(experts, capabilities))
            .read(1, Slot::Input(0))
            .read(4, Slot::Input(1))
            .read(6, Slot::Input(2))
            .write(7, Slot::Output(0))
            .folded(tokens, capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
