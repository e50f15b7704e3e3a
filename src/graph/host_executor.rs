//! Runs a plan on the CPU with the operations' references.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::Precision;
use crate::error::{Error, Result};
use crate::graph::plan::{Place, Plan};
use crate::graph::session::Compiled;
use crate::ops::{HostBuffer, HostIo, Real};
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// The memory of a session on the host.
#[derive(Debug)]
pub(crate) struct HostExecutor {
    pub(crate) precision: Precision,
    pub(crate) checked: bool,
    /// Inputs, constants and pool buffers.
    memory: HashMap<Place, HostBuffer>,
    parameters: HashMap<usize, Arc<Mutex<HostBuffer>>>,
}

/// A tensor's elements as a host buffer, floats in the given precision.
pub(crate) fn host_words(tensor: &Tensor, precision: Precision) -> HostBuffer {
    fn pack<T: bytemuck::Pod>(elements: &[T]) -> HostBuffer {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        let mut words = vec![0_u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        words
    }
    match (tensor.data(), precision) {
        (TensorData::I32(data), _) => pack(data),
        (TensorData::F32(data), Precision::F32) => pack(data),
        (TensorData::F64(data), Precision::F64) => pack(data),
        (_, Precision::F32) => pack(&tensor.to_f32()),
        (_, Precision::F64) => pack(&tensor.to_f64()),
    }
}

/// The other way round.
pub(crate) fn tensor_of_words(
    words: &[u64],
    ty: &TensorType,
    precision: Precision,
) -> Result<Tensor> {
    fn unpack<T: bytemuck::Pod>(words: &[u64], count: usize) -> Vec<T> {
        bytemuck::cast_slice(words)[..count].to_vec()
    }
    let count = ty.elements();
    let data = match (ty.dtype, precision) {
        (DType::I32, _) => TensorData::I32(unpack(words, count)),
        (_, Precision::F32) => TensorData::F32(unpack(words, count)),
        (_, Precision::F64) => TensorData::F64(unpack(words, count)),
    };
    Tensor::new(ty.shape.clone(), data)
}

impl HostExecutor {
    pub(crate) fn new(
        precision: Precision,
        checked: bool,
        plan: &Plan,
        compiled: &Compiled,
        parameters: HashMap<usize, Arc<Mutex<HostBuffer>>>,
    ) -> Self {
        let mut memory = HashMap::new();
        for (index, bytes) in plan.pool.iter().enumerate() {
            memory.insert(Place::Pool(index), vec![0; bytes.div_ceil(8) as usize]);
        }
        for &index in &plan.inputs {
            let bytes = compiled.types[index as usize].elements() as u64 * 8;
            memory.insert(Place::Input(index), vec![0; bytes.div_ceil(8) as usize]);
        }
        for (index, tensor) in &compiled.constants {
            memory.insert(Place::Constant(*index), host_words(tensor, precision));
        }
        Self {
            precision,
            checked,
            memory,
            parameters,
        }
    }

    pub(crate) fn write(&mut self, place: Place, tensor: &Tensor) {
        self.memory
            .insert(place, host_words(tensor, self.precision));
    }

    pub(crate) fn read(&self, place: Place, ty: &TensorType) -> Result<Tensor> {
        match place {
            Place::Parameter(index) => {
                let words = self.parameters[&index]
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                tensor_of_words(&words, ty, self.precision)
            }
            _ => tensor_of_words(&self.memory[&place], ty, self.precision),
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
        match self.precision {
            Precision::F32 => self.run_as::<f32>(plan, compiled),
            Precision::F64 => self.run_as::<f64>(plan, compiled),
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
        for &(value, copy) in &step.copies {
            let places = (plan.places[value as usize], plan.places[copy as usize]);
            let (Some(from), Some(to)) = places else {
                continue;
            };
            let Some(mut target) = memory.remove(&to) else {
                continue;
            };
            let bytes = compiled.types[value as usize].elements() * size_of::<R>();
            let words = bytes.div_ceil(8);
            target[..words].copy_from_slice(&memory[&from][..words]);
            memory.insert(to, target);
        }
        let mut taken: Vec<(Place, HostBuffer)> = step
            .outputs
            .iter()
            .filter_map(|place| memory.remove(place).map(|words| (*place, words)))
            .collect();
        let inputs = step
            .inputs
            .iter()
            .zip(&node.inputs)
            .map(|(place, &value)| {
                memory
                    .get(place)
                    .map(|words| (&words[..], &compiled.types[value as usize]))
            })
            .collect();
        let outputs = taken
            .iter_mut()
            .zip(&node.outputs)
            .map(|((_, words), &value)| Some((&mut words[..], &compiled.types[value as usize])))
            .collect();
        let outcome = R::run(&*node.op, HostIo::new(inputs, outputs));
        for (place, words) in taken {
            memory.insert(place, words);
        }
        outcome?;
        if checked {
            for (place, &value) in step.outputs.iter().zip(&node.outputs) {
                let ty = &compiled.types[value as usize];
                if ty.dtype == DType::I32 {
                    continue;
                }
                let floats: &[R] = &bytemuck::cast_slice(&memory[place])[..ty.elements()];
                if let Some(element) = floats.iter().position(|x| !x.is_finite()) {
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
