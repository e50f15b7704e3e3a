//! 16-bit storage in a plan: which values have it, and the launches that read and write them so. Operations know nothing of it.

use crate::device::{
    Access, Capabilities, Element, HalfForm, Launch, Launches, Slot, element_of, is_integers,
    with_halves,
};
use crate::error::Result;
use crate::graph::{Graph, Source, Storage, Value};
use crate::ops::{AliasKind, element_wise, shader};
use crate::tensor::{DType, TensorType};

/// What every value is stored in, given what each parameter is (by its number). Values that share memory are stored alike: if one
/// of them must stay in f32, all do.
pub(crate) fn storages(graph: &Graph, parameter: impl Fn(usize) -> Storage) -> Vec<Storage> {
    let mut parent: Vec<usize> = (0..graph.values.len()).collect();
    let find = |parent: &[usize], mut index: usize| {
        while parent[index] != index {
            index = parent[index];
        }
        index
    };
    for node in &graph.nodes {
        for alias in node.op.aliases() {
            let (input, output) = (node.inputs[alias.input], node.outputs[alias.output]);
            let (into, from) = (
                find(&parent, input.index as usize),
                find(&parent, output.index as usize),
            );
            // What is given, and views of it, keep their storage, and are copied where an operation writes over them.
            let is_given = !matches!(graph.values[into].source, Source::Node { .. });
            if alias.kind == AliasKind::Accumulate && is_given {
                continue;
            }
            parent[from] = into;
        }
    }
    let mut of_root: Vec<Storage> = graph
        .values
        .iter()
        .map(|value| match value.source {
            Source::Parameter(index) => parameter(index),
            _ => value.storage,
        })
        .collect();
    for (index, value) in graph.values.iter().enumerate() {
        let root = find(&parent, index);
        // What is given is stored as it is; its views and updates follow it.
        let is_computed = matches!(graph.values[root].source, Source::Node { .. });
        if value.storage == Storage::F32 && is_computed {
            of_root[root] = Storage::F32;
        }
    }
    (0..graph.values.len())
        .map(|index| of_root[find(&parent, index)])
        .collect()
}

/// The types of values, and what each is stored in.
pub(crate) fn stored_types(
    graph: &Graph,
    storages: &[Storage],
    values: &[Value],
) -> Vec<(TensorType, Storage)> {
    let indices = values.iter().map(|value| value.index as usize);
    indices
        .map(|index| (graph.values[index].ty.clone(), storages[index]))
        .collect()
}

/// What stands behind an operation's key in [`KernelChoices`](crate::device::KernelChoices), as storage changes what its kernels cost: nothing where
/// all floats are in 32 bits, or ` from f16, f32 to f16`.
pub(crate) fn behind_key(
    inputs: &[(TensorType, Storage)],
    outputs: &[(TensorType, Storage)],
) -> String {
    let floats = |values: &[(TensorType, Storage)]| -> Vec<&'static str> {
        let floats = values.iter().filter(|(ty, _)| ty.dtype == DType::F32);
        floats
            .map(|(_, storage)| match storage {
                Storage::F32 => "f32",
                Storage::F16 => "f16",
            })
            .collect()
    };
    let (inputs, outputs) = (floats(inputs), floats(outputs));
    if inputs
        .iter()
        .chain(&outputs)
        .all(|&storage| storage == "f32")
    {
        return String::new();
    }
    format!(" from {} to {}", inputs.join(", "), outputs.join(", "))
}

/// The operands of an operation whose launches are to be changed.
pub(crate) struct Operands<'a> {
    pub(crate) inputs: &'a [Storage],
    pub(crate) outputs: &'a [Storage],
    pub(crate) output_types: &'a [TensorType],
    /// Outputs that arrive holding an input's elements.
    pub(crate) continued: &'a [usize],
}

impl Operands<'_> {
    fn is_half(&self, slot: Slot) -> bool {
        let storage = match slot {
            Slot::Input(index) => self.inputs[index],
            Slot::Output(index) => self.outputs[index],
            Slot::Scratch(_) => Storage::F32,
        };
        storage == Storage::F16
    }
}

/// The launches of an operation some of whose operands are stored in 16 bits.
///
/// Each kernel is replaced by its form for such bindings. Without `shader-f16` an output that is written float by float cannot be
/// stored in halves directly: it is computed in f32 scratch memory, and packed after the operation's last launch.
pub(crate) fn lower(
    mut launches: Launches,
    operands: &Operands<'_>,
    capabilities: &Capabilities,
) -> Result<Launches> {
    let storages = operands.inputs.iter().chain(operands.outputs);
    if launches.launches.is_empty() || storages.into_iter().all(|&storage| storage == Storage::F32)
    {
        return Ok(launches);
    }
    let form = if capabilities.f16 {
        HalfForm::Native
    } else {
        HalfForm::Packed
    };
    // Outputs that go through scratch memory, and where.
    let mut staged: Vec<Option<Slot>> = vec![None; operands.outputs.len()];
    if form == HalfForm::Packed {
        for launch in &launches.launches {
            for binding in &launch.bindings {
                if let Slot::Output(index) = binding.slot
                    && binding.access == Access::ReadWrite
                    && operands.is_half(binding.slot)
                    && staged[index].is_none()
                    && element_of(launch.shader, binding.number) == Some(Element::Scalar)
                {
                    let words = operands.output_types[index].elements().next_multiple_of(4);
                    launches.scratch.push(words as u64 * 4);
                    staged[index] = Some(Slot::Scratch(launches.scratch.len() - 1));
                }
            }
        }
    }
    for launch in &mut launches.launches {
        let mut halves = Vec::new();
        for binding in &mut launch.bindings {
            match binding.slot {
                Slot::Output(index) if staged[index].is_some() => {
                    binding.slot = staged[index].unwrap_or(binding.slot);
                }
                // An array of integers stands in for one of floats that is not read.
                slot if operands.is_half(slot) && !is_integers(launch.shader, binding.number) => {
                    halves.push(binding.number);
                }
                _ => {}
            }
        }
        if !halves.is_empty() {
            launch.shader = with_halves(launch.shader, &halves, form)?;
        }
    }
    for (index, slot) in staged.iter().enumerate() {
        let Some(slot) = *slot else { continue };
        let elements = operands.output_types[index].elements();
        let output = Slot::Output(index);
        if operands.continued.contains(&index) {
            let launch = conversion(Storage::F16, elements, output, slot, capabilities)?;
            launches.launches.insert(0, launch);
        }
        let launch = conversion(Storage::F32, elements, slot, output, capabilities)?;
        launches.launches.push(launch);
    }
    Ok(launches)
}

/// Copies floats from one storage to the other.
pub(crate) fn conversion(
    from: Storage,
    elements: usize,
    source: Slot,
    target: Slot,
    capabilities: &Capabilities,
) -> Result<Launch> {
    let (entry, numbers) = match from {
        Storage::F32 => ("pack", [1, 2]),
        Storage::F16 => ("unpack", [3, 4]),
    };
    let launch = Launch::new(shader!("half", "narrow_packed"), entry)
        .read(numbers[0], source)
        .write(numbers[1], target)
        .param(elements);
    element_wise(launch, elements, capabilities)
}
