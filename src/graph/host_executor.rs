//! Runs a plan on the CPU with the operations' references.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;

use crate::device::HostFloat;
use crate::error::{Error, Result};
use crate::graph::Storage;
use crate::graph::compiled::Compiled;
use crate::graph::plan::{Place, Plan};
use crate::ops::{HostBuffer, HostIo, Real};
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// The memory of a session on the host.
#[derive(Debug)]
pub(crate) struct HostExecutor {
    pub(crate) float: HostFloat,
    pub(crate) checked: bool,
    /// Inputs, constants and pool buffers.
    memory: HashMap<Place, HostBuffer>,
    parameters: HashMap<usize, Arc<Mutex<HostBuffer>>>,
}

/// How a value's floats lie in host memory: in halves only where the executor computes in 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elements {
    Halves,
    Floats(HostFloat),
}

impl Elements {
    fn new(float: HostFloat, storage: Storage) -> Self {
        match (float, storage) {
            (HostFloat::F32, Storage::F16) => Self::Halves,
            _ => Self::Floats(float),
        }
    }
}

/// Memory of so many bytes, all 0, if the system gives that much: many systems give more than they have, and end a process that uses it.
fn zeros(thing: &str, bytes: u64) -> Result<HostBuffer> {
    let words = usize::try_from(bytes.div_ceil(8)).map_err(|_| ());
    let zeros = words.and_then(bytemuck::allocation::try_zeroed_vec);
    zeros.map_err(|()| Error::OutOfMemory {
        thing: thing.to_owned(),
        bytes,
    })
}

fn pack<T: bytemuck::Pod>(elements: &[T]) -> Result<HostBuffer> {
    let bytes: &[u8] = bytemuck::cast_slice(elements);
    let mut words = zeros("a tensor", bytes.len() as u64)?;
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Ok(words)
}

/// A tensor's elements as a host buffer.
pub(crate) fn host_words(
    tensor: &Tensor,
    float: HostFloat,
    storage: Storage,
) -> Result<HostBuffer> {
    match (tensor.data(), Elements::new(float, storage)) {
        (TensorData::I32(data), _) => pack(data),
        (TensorData::F32(data), Elements::Floats(HostFloat::F32)) => pack(data),
        (TensorData::F64(data), Elements::Floats(HostFloat::F64)) => pack(data),
        (_, Elements::Floats(HostFloat::F32)) => pack(&tensor.to_f32()),
        (_, Elements::Floats(HostFloat::F64)) => pack(&tensor.to_f64()),
        (_, Elements::Halves) => pack(&Vec::<f16>::from_f32_slice(&tensor.to_f32())),
    }
}

/// The other way round.
pub(crate) fn tensor_of_words(
    words: &[u64],
    ty: &TensorType,
    float: HostFloat,
    storage: Storage,
) -> Result<Tensor> {
    fn unpack<T: bytemuck::Pod>(words: &[u64], count: usize) -> Vec<T> {
        bytemuck::cast_slice(words)[..count].to_vec()
    }
    let count = ty.elements();
    let data = match (ty.dtype, Elements::new(float, storage)) {
        (DType::I32, _) => TensorData::I32(unpack(words, count)),
        (_, Elements::Floats(HostFloat::F32)) => TensorData::F32(unpack(words, count)),
        (_, Elements::Floats(HostFloat::F64)) => TensorData::F64(unpack(words, count)),
        (_, Elements::Halves) => TensorData::F32(halves(words, count).to_f32_vec()),
    };
    Tensor::new(ty.shape.clone(), data)
}

fn halves(words: &[u64], count: usize) -> &[f16] {
    &bytemuck::cast_slice(words)[..count]
}

/// A value stored in halves, widened for an operation's reference.
fn widened(words: &[u64], count: usize) -> HostBuffer {
    let mut wide = vec![0_u64; count.div_ceil(2)];
    let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut wide);
    halves(words, count).convert_to_f32_slice(&mut floats[..count]);
    wide
}

/// The other way round.
fn narrow(wide: &[u64], words: &mut [u64], count: usize) {
    let floats: &[f32] = &bytemuck::cast_slice(wide)[..count];
    let halves: &mut [f16] = &mut bytemuck::cast_slice_mut(words)[..count];
    halves.convert_from_f32_slice(floats);
}

impl HostExecutor {
    pub(crate) fn new(
        float: HostFloat,
        checked: bool,
        plan: &Plan,
        compiled: &Compiled,
        parameters: HashMap<usize, Arc<Mutex<HostBuffer>>>,
    ) -> Result<Self> {
        let mut memory = HashMap::new();
        for (index, bytes) in plan.pool.iter().enumerate() {
            memory.insert(
                Place::Pool(index),
                zeros("the pool of computed values", *bytes)?,
            );
        }
        for &index in &plan.inputs {
            let bytes = compiled.types[index as usize].elements() as u64 * 8;
            let words = zeros(&compiled.descriptions[index as usize], bytes)?;
            memory.insert(Place::Input(index), words);
        }
        for (index, tensor) in &compiled.constants {
            memory.insert(
                Place::Constant(*index),
                host_words(tensor, float, Storage::F32)?,
            );
        }
        Ok(Self {
            float,
            checked,
            memory,
            parameters,
        })
    }

    pub(crate) fn write(&mut self, place: Place, tensor: &Tensor) -> Result<()> {
        let words = host_words(tensor, self.float, Storage::F32)?;
        self.memory.insert(place, words);
        Ok(())
    }

    pub(crate) fn read(&self, place: Place, ty: &TensorType, storage: Storage) -> Result<Tensor> {
        match place {
            Place::Parameter(index) => {
                let words = self.parameters[&index]
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                tensor_of_words(&words, ty, self.float, storage)
            }
            _ => tensor_of_words(&self.memory[&place], ty, self.float, storage),
        }
    }

    pub(crate) fn poison(&mut self, pool: usize) {
        for index in 0..pool {
            if let Some(words) = self.memory.get_mut(&Place::Pool(index)) {
                words.fill(u64::MAX);
            }
        }
    }

    pub(crate) fn run(&mut self, plan: &Plan, compiled: &Compiled) -> Result<()> {
        match self.float {
            HostFloat::F32 => self.run_as::<f32>(plan, compiled),
            HostFloat::F64 => self.run_as::<f64>(plan, compiled),
        }
    }

    fn run_as<R: Real>(&mut self, plan: &Plan, compiled: &Compiled) -> Result<()> {
        // Parameters are lent by the store for the run, and given back whatever happens.
        let mut guards: Vec<_> = {
            // Locked in the order of their addresses, so that two sessions never wait for each other.
            let mut lent: Vec<_> = self.parameters.iter().collect();
            lent.sort_by_key(|(_, storage)| Arc::as_ptr(storage) as usize);
            lent.into_iter()
                .map(|(&index, storage)| {
                    (
                        index,
                        storage.lock().unwrap_or_else(PoisonError::into_inner),
                    )
                })
                .collect()
        };
        for (index, guard) in &mut guards {
            self.memory
                .insert(Place::Parameter(*index), std::mem::take(&mut **guard));
        }
        let outcome = run_steps::<R>(&mut self.memory, plan, compiled, self.checked);
        for (index, guard) in &mut guards {
            if let Some(words) = self.memory.remove(&Place::Parameter(*index)) {
                **guard = words;
            }
        }
        outcome
    }
}

fn run_steps<R: Real>(
    memory: &mut HashMap<Place, HostBuffer>,
    plan: &Plan,
    compiled: &Compiled,
    checked: bool,
) -> Result<()> {
    for step in &plan.steps {
        let node = &compiled.nodes[step.node];
        if node.is_view {
            continue;
        }
        let elements = |value: u32| compiled.types[value as usize].elements();
        // The reference in 64 bits stores everything in 64 bits.
        let in_halves = |value: u32| {
            size_of::<R>() == size_of::<f32>()
                && compiled.types[value as usize].dtype == DType::F32
                && compiled.storages[value as usize] == Storage::F16
        };
        for &(value, copy) in &step.copies {
            let places = (plan.places[value as usize], plan.places[copy as usize]);
            let (Some(from), Some(to)) = places else {
                continue;
            };
            let Some(mut target) = memory.remove(&to) else {
                continue;
            };
            let count = elements(value);
            match (in_halves(value), in_halves(copy)) {
                (true, false) => {
                    let wide = widened(&memory[&from], count);
                    target[..wide.len()].copy_from_slice(&wide);
                }
                (false, true) => narrow(&memory[&from], &mut target, count),
                (half, _) => {
                    let words = (count * if half { 2 } else { size_of::<R>() }).div_ceil(8);
                    target[..words].copy_from_slice(&memory[&from][..words]);
                }
            }
            memory.insert(to, target);
        }
        let mut taken: Vec<(Place, HostBuffer)> = step
            .outputs
            .iter()
            .filter_map(|place| memory.remove(place).map(|words| (*place, words)))
            .collect();
        // References compute in R: operands stored in halves are widened for them, results rounded.
        let wide_inputs: Vec<Option<HostBuffer>> = step
            .inputs
            .iter()
            .zip(&node.inputs)
            .map(|(place, &value)| {
                let words = memory.get(place).filter(|_| in_halves(value))?;
                Some(widened(words, elements(value)))
            })
            .collect();
        let mut wide_outputs: Vec<Option<HostBuffer>> = taken
            .iter()
            .zip(&node.outputs)
            .map(|((_, words), &value)| in_halves(value).then(|| widened(words, elements(value))))
            .collect();
        let inputs = step
            .inputs
            .iter()
            .zip(&node.inputs)
            .zip(&wide_inputs)
            .map(|((place, &value), wide)| {
                let words = wide.as_ref().or_else(|| memory.get(place));
                words.map(|words| (&words[..], &compiled.types[value as usize]))
            })
            .collect();
        let outputs = taken
            .iter_mut()
            .zip(&node.outputs)
            .zip(&mut wide_outputs)
            .map(|(((_, words), &value), wide)| {
                let words = wide.as_mut().unwrap_or(words);
                Some((&mut words[..], &compiled.types[value as usize]))
            })
            .collect();
        let outcome = R::run(&*node.op, HostIo::new(inputs, outputs));
        for (((place, mut words), &value), wide) in
            taken.into_iter().zip(&node.outputs).zip(&wide_outputs)
        {
            if let Some(wide) = wide {
                narrow(wide, &mut words, elements(value));
            }
            memory.insert(place, words);
        }
        outcome?;
        if checked {
            for (place, &value) in step.outputs.iter().zip(&node.outputs) {
                let ty = &compiled.types[value as usize];
                if ty.dtype == DType::I32 {
                    continue;
                }
                let words = &memory[place];
                let found = if in_halves(value) {
                    let stored = halves(words, ty.elements());
                    stored.iter().position(|x| !x.is_finite())
                } else {
                    let floats: &[R] = &bytemuck::cast_slice(words)[..ty.elements()];
                    floats.iter().position(|x| !x.is_finite())
                };
                if let Some(element) = found {
                    return Err(Error::NotFinite {
                        value: compiled.descriptions[value as usize].clone(),
                        element,
                    });
                }
            }
        }
    }
    Ok(())
}
