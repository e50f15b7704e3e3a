//! Cross-entropy of class labels, the loss of language models.

use rayon::prelude::*;

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::graph::{Backward, Graph, Value};
use crate::host_reference;
use crate::ops::host::max_and_sum;
use crate::ops::host_sum::total_of;
use crate::ops::{
    HostIo, IndexRange, LaunchTypes, Op, Real, TOTAL_WORKGROUP, Work, dims_f32, expect_count,
    expect_f32, expect_i32, row_workgroup, shader,
};
use crate::tensor::TensorType;

const WORKGROUP: usize = 64;

/// The label of a row that [`Graph::cross_entropy`] leaves out.
pub const IGNORED_LABEL: i32 = -100;

/// Results: the loss, the log-sum-exp of every row, and the number of rows with a label.
#[derive(Clone, Copy, Debug)]
struct CrossEntropy;

/// Operands logits, labels, log-sum-exp, number of rows with a label, dloss.
#[derive(Clone, Copy, Debug)]
struct CrossEntropyBackward;

impl Graph {
    /// The mean over the rows with a label of `logsumexp(logits) - logits[label]`, a scalar: `logits` is `[rows, classes]`,
    /// `labels` are integers `[rows]`. A row with the label -100 ([`IGNORED_LABEL`]) is left out; if all are, the loss and its
    /// gradients are 0. Labels do not shift: row t is scored against label t.
    ///
    /// Labels that the host writes are checked: a session answers
    /// [`Error::IndexOutOfRange`](crate::Error::IndexOutOfRange) to any outside `0..classes` but -100. Labels that an
    /// operation computes are clamped to that range.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the operands have other shapes or types.
    pub fn cross_entropy(&mut self, logits: Value, labels: Value) -> Result<Value> {
        self.apply1(CrossEntropy, &[logits, labels])
    }
}

/// The class that a label stands for, in bounds whatever the label.
fn class_of(label: i32, classes: usize) -> usize {
    usize::try_from(label).unwrap_or(0).min(classes - 1)
}

fn index_range(classes: usize) -> Vec<IndexRange> {
    vec![IndexRange {
        input: 1,
        limit: classes,
        ignored: Some(IGNORED_LABEL),
    }]
}

impl CrossEntropy {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, labels) = (io.floats(0)?, io.ints(1)?);
        let classes = logits.len() / labels.len();
        let (loss, lse, valid) = (io.floats_out(0)?, io.floats_out(1)?, io.floats_out(2)?);
        // The difference to the maximum first: a small loss is not rounded as the large logits are. Collected before they are
        // added up, so that the order of the additions does not depend on the threads; counted as integers, which do not stop at 2^24.
        let rows = logits
            .par_chunks_exact(classes)
            .zip(labels)
            .zip(lse.par_iter_mut());
        let losses: Vec<R> = rows
            .map(|((row, &label), lse)| {
                let (max, sum) = max_and_sum(row);
                *lse = max + sum.ln();
                match label {
                    IGNORED_LABEL => R::zero(),
                    _ => (max - row[class_of(label, classes)]) + sum.ln(),
                }
            })
            .collect();
        let labelled = labels.iter().filter(|&&label| label != IGNORED_LABEL);
        valid[0] = R::of(labelled.count() as f64);
        loss[0] = total_of(&losses, |loss| loss) / valid[0].max(R::one());
        Ok(())
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the maximum, exp, its sum; each row's logarithm and loss.
        let [rows, classes] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        Ok(Work::moving(io).with_flops(rows * (3 * classes + 4)))
    }

    fn keeps_f32(&self, _output: usize) -> bool {
        true
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 2)?;
        let [rows, _] = dims_f32(self.name(), "the logits", &inputs[0])?;
        expect_i32(self.name(), "the labels", &inputs[1], &[rows])?;
        Ok(vec![
            TensorType::f32([]),
            TensorType::f32([rows]),
            TensorType::f32([]),
        ])
    }

    fn backward(&self, context: &mut Backward<'_>) -> Result<()> {
        let Some(dloss) = context.gradient(0) else {
            return Ok(());
        };
        let (logits, labels) = (context.input(0), context.input(1));
        let (lse, valid) = (context.output(1), context.output(2));
        let dlogits = context
            .graph
            .apply1(CrossEntropyBackward, &[logits, labels, lse, valid, dloss])?;
        context.add(0, dlogits)
    }

    fn index_ranges(&self, inputs: &[TensorType]) -> Vec<IndexRange> {
        index_range(inputs[0].shape.last())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, classes] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let mut launches = Launches::default();
        let loss_of_row = launches.scratch_words(rows);
        let launch = |entry| {
            Launch::new(shader!("cross_entropy", "reduce", "soft_max"), entry)
                .param(rows)
                .param(classes)
        };
        launches.launches.push(
            launch("row")
                .constant("WORKGROUP", row_workgroup(classes, capabilities))
                .read(1, Slot::Input(0))
                .read(2, Slot::Input(1))
                .write(3, Slot::Output(1))
                .write(4, loss_of_row)
                .folded(rows, capabilities)?,
        );
        launches.launches.push(
            launch("total")
                .constant("WORKGROUP", TOTAL_WORKGROUP)
                .read(2, Slot::Input(1))
                .write(4, loss_of_row)
                .write(5, Slot::Output(0))
                .write(6, Slot::Output(2))
                .folded(1, capabilities)?,
        );
        Ok(launches)
    }

    host_reference!();
}

impl CrossEntropyBackward {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let (logits, labels, lse) = (io.floats(0)?, io.ints(1)?, io.floats(2)?);
        let (valid, dloss) = (io.floats(3)?[0], io.floats(4)?[0]);
        let classes = logits.len() / labels.len();
        let scale = dloss / valid.max(R::one());
        let dlogits = io.floats_out(0)?;
        let rows = dlogits
            .par_chunks_exact_mut(classes)
            .zip(logits.par_chunks_exact(classes))
            .zip(labels)
            .zip(lse);
        rows.for_each(|(((dlogits, logits), &label), &lse)| {
            if label == IGNORED_LABEL {
                dlogits.fill(R::zero());
                return;
            }
            for (dlogit, &logit) in dlogits.iter_mut().zip(logits) {
                *dlogit = scale * (logit - lse).exp();
            }
            dlogits[class_of(label, classes)] -= scale;
        });
        Ok(())
    }
}

impl Op for CrossEntropyBackward {
    fn name(&self) -> &'static str {
        "cross_entropy_backward"
    }

    fn work(&self, io: LaunchTypes<'_>) -> Result<Work> {
        // The difference to the log-sum-exp, exp, the factor.
        Ok(Work::moving(io).with_flops(3 * io.outputs[0].elements()))
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        expect_count(self.name(), inputs, 5)?;
        let [rows, _] = dims_f32(self.name(), "the logits", &inputs[0])?;
        expect_i32(self.name(), "the labels", &inputs[1], &[rows])?;
        expect_f32(self.name(), "the log-sum-exp", &inputs[2], &[rows])?;
        expect_f32(self.name(), "the number of labels", &inputs[3], &[])?;
        expect_f32(self.name(), "dloss", &inputs[4], &[])?;
        Ok(vec![inputs[0].clone()])
    }

    fn index_ranges(&self, inputs: &[TensorType]) -> Vec<IndexRange> {
        index_range(inputs[0].shape.last())
    }

    fn launches(&self, io: LaunchTypes<'_>, capabilities: &Capabilities) -> Result<Launches> {
        let [rows, classes] = dims_f32(self.name(), "the logits", &io.inputs[0])?;
        let launch = Launch::new(shader!("cross_entropy", "reduce", "soft_max"), "backward")
            .read(1, Slot::Input(0))
            .read(2, Slot::Input(1))
            .read(7, Slot::Input(2))
            .read(8, Slot::Input(3))
            .read(9, Slot::Input(4))
            .write(10, Slot::Output(0))
            .param(rows)
            .param(classes)
            .folded((rows * classes).div_ceil(WORKGROUP), capabilities)?;
        Ok(launch.into())
    }

    host_reference!();
}
