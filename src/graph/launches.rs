//! Every launch of a plan in order: what operations launch, the copies that the planner adds, the checks of checked mode.

use crate::device::{Capabilities, Launch, Slot};
use crate::error::Result;
use crate::graph::compiled::Compiled;
use crate::graph::halves::{conversion, storages};
use crate::graph::plan::{Place, Plan, Target, plan};
use crate::graph::{Graph, Storage};
use crate::ops::{element_wise, shader};
use crate::tensor::DType;

const WORKGROUP: usize = 64;

/// What a kernel's binding refers to, so that it can be bound again when the host brings a buffer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Value(u32),
    Scratch(Place),
    Checks,
}

/// The launches of a plan with their operands.
pub(crate) struct Resolved {
    pub(crate) launches: Vec<(Launch, Vec<Operand>)>,
    /// The values that checked mode scans, in the order of its findings.
    pub(crate) checked_values: Vec<u32>,
}

impl Graph {
    /// The kernels that a session on a device of these capabilities would run, in checked mode or not, in order, as data: to be looked
    /// at, checked and counted without a device.
    ///
    /// # Errors
    /// [`Error::Limit`](crate::Error::Limit) if an operation is more than such a device can do.
    pub fn launches(&self, capabilities: &Capabilities, checked: bool) -> Result<Vec<Launch>> {
        let target = Target {
            capabilities: Some(capabilities),
            float_bytes: 4,
        };
        let stored = storages(self, |index| self.parameters[index].storage);
        let plan = plan(self, target, stored)?;
        let resolved = resolve(capabilities, checked, &plan, &self.compiled(&plan)?)?;
        let launches = resolved.launches.into_iter();
        Ok(launches.map(|(launch, _)| launch).collect())
    }
}

/// The launches of a plan on a device of these capabilities.
pub(crate) fn resolve(
    capabilities: &Capabilities,
    checked: bool,
    plan: &Plan,
    compiled: &Compiled,
) -> Result<Resolved> {
    let mut launches = Vec::new();
    let mut checked_values = Vec::new();
    for step in &plan.steps {
        let node = &compiled.nodes[step.node];
        for &(from, to) in &step.copies {
            let launch = copy(compiled, from, to, capabilities)?;
            launches.push((launch, vec![Operand::Value(from), Operand::Value(to)]));
        }
        for launch in &step.launches.launches {
            let operands = launch
                .bindings
                .iter()
                .map(|binding| match binding.slot {
                    Slot::Input(index) => Operand::Value(node.inputs[index]),
                    Slot::Output(index) => Operand::Value(node.outputs[index]),
                    Slot::Scratch(index) => Operand::Scratch(step.scratch[index]),
                })
                .collect();
            launches.push((launch.clone(), operands));
        }
        if !checked || node.is_view {
            continue;
        }
        for &value in &node.outputs {
            if compiled.types[value as usize].dtype == DType::I32 {
                continue;
            }
            let launch = check(compiled, value, checked_values.len(), capabilities)?;
            checked_values.push(value);
            launches.push((launch, vec![Operand::Value(value), Operand::Checks]));
        }
    }
    Ok(Resolved {
        launches,
        checked_values,
    })
}

/// Copies a value to another of the same type, which may be stored otherwise.
fn copy(compiled: &Compiled, from: u32, to: u32, capabilities: &Capabilities) -> Result<Launch> {
    let (source, target) = (Slot::Input(0), Slot::Output(0));
    let stored = |value: u32| compiled.storages[value as usize];
    if stored(from) != stored(to) {
        let elements = compiled.types[from as usize].elements();
        return conversion(stored(from), elements, source, target, capabilities);
    }
    let words = compiled.bytes(from).div_ceil(16) as usize;
    let launch = Launch::new(shader!("copy"), "forward")
        .read(1, source)
        .write(2, target)
        .param(words);
    element_wise(launch, 4 * words, capabilities)
}

/// Looks for NaN and infinity in a value: the check of that number.
fn check(
    compiled: &Compiled,
    value: u32,
    number: usize,
    capabilities: &Capabilities,
) -> Result<Launch> {
    let entry = match compiled.storages[value as usize] {
        Storage::F32 => "forward",
        Storage::F16 => "halves",
    };
    let elements = compiled.types[value as usize].elements();
    Launch::new(shader!("check_finite"), entry)
        .read(1, Slot::Output(0))
        .write(2, Slot::Scratch(0))
        .param(elements)
        .param(number)
        .folded(elements.div_ceil(WORKGROUP), capabilities)
}
