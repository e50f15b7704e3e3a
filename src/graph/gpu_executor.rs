//! Runs a plan on a GPU: buffers, one recording, one submit a run.

use std::collections::HashMap;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::device::{
    Bound, Buffer, CommandEncoder, Gpu, HostBuffer, Launch, LaunchTiming, Recording,
};
use crate::error::{Error, Result};
use crate::graph::Storage;
use crate::graph::compiled::Compiled;
use crate::graph::launches::{Operand, Resolved, resolve};
use crate::graph::plan::{Place, Plan};
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// A NaN scan of checked mode.
#[derive(Debug)]
struct Checks {
    first: Buffer,
    /// The value that each entry of `first` is about.
    values: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct GpuExecutor {
    gpu: Arc<Gpu>,
    memory: HashMap<Place, Bound>,
    /// Buffers that the host application brought, by the class of the value.
    foreign: HashMap<usize, Bound>,
    recording: Recording,
    /// Every launch with its operands, in the order of the recording.
    launches: Vec<(Launch, Vec<Operand>)>,
    checks: Option<Checks>,
    /// Readback buffers by value, made when first asked for.
    staging: HashMap<u32, Buffer>,
}

impl GpuExecutor {
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        plan: &Plan,
        compiled: &Compiled,
        parameters: &HashMap<usize, Buffer>,
    ) -> Result<Self> {
        let mut memory = HashMap::new();
        let bound = |buffer: Buffer, bytes: u64| Bound { buffer, bytes };
        for (index, &bytes) in plan.pool.iter().enumerate() {
            let buffer = gpu.allocate(&format!("pool buffer {index}"), bytes)?;
            memory.insert(Place::Pool(index), bound(buffer, bytes));
        }
        for &index in &plan.inputs {
            let bytes = compiled.bytes(index);
            let buffer = gpu.allocate(&compiled.descriptions[index as usize], bytes)?;
            memory.insert(Place::Input(index), bound(buffer, bytes));
        }
        for (index, tensor) in &compiled.constants {
            let bytes = compiled.bytes(*index);
            let buffer = gpu.allocate("a constant", bytes)?;
            gpu.write(&buffer, &device_bytes(tensor));
            memory.insert(Place::Constant(*index), bound(buffer, bytes));
        }
        for &index in &plan.parameters {
            let buffer = parameters[&index].clone();
            let bytes = buffer.raw().size();
            memory.insert(Place::Parameter(index), bound(buffer, bytes));
        }

        let Resolved {
            launches,
            checked_values,
        } = resolve(&gpu.summary.capabilities, gpu.checked, plan, compiled)?;
        let checks = if checked_values.is_empty() {
            None
        } else {
            let first = gpu.allocate("checked mode's findings", checked_values.len() as u64 * 4)?;
            Some(Checks {
                first,
                values: checked_values,
            })
        };
        let mut executor = Self {
            gpu: Arc::clone(gpu),
            memory,
            foreign: HashMap::new(),
            recording: Recording::new(gpu, &[])?,
            launches,
            checks,
            staging: HashMap::new(),
        };
        let bound = executor
            .launches
            .iter()
            .map(|(launch, operands)| (launch, executor.bound(plan, compiled, operands)));
        let recording = Recording::new(gpu, &bound.collect::<Vec<_>>())?;
        executor.recording = recording;
        Ok(executor)
    }

    fn bound(&self, plan: &Plan, compiled: &Compiled, operands: &[Operand]) -> Vec<Bound> {
        operands
            .iter()
            .map(|operand| match *operand {
                Operand::Value(value) => {
                    let bytes = compiled.bytes(value);
                    let class = plan.classes[value as usize];
                    let buffer = match (self.foreign.get(&class), plan.places[value as usize]) {
                        (Some(foreign), _) => foreign.buffer.clone(),
                        (None, Some(place)) => self.memory[&place].buffer.clone(),
                        (None, None) => unreachable!("the operands of live operations have places"),
                    };
                    Bound { buffer, bytes }
                }
                Operand::Scratch(place) => self.memory[&place].clone(),
                Operand::Checks => match &self.checks {
                    Some(checks) => Bound {
                        buffer: checks.first.clone(),
                        bytes: checks.values.len() as u64 * 4,
                    },
                    None => unreachable!("only checked mode has launches that bind its findings"),
                },
            })
            .collect()
    }

    pub(crate) fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.launches.iter().map(|(launch, _)| launch)
    }

    pub(crate) fn write(&self, plan: &Plan, input: u32, tensor: &Tensor) -> Result<()> {
        let foreign = self.foreign.get(&plan.classes[input as usize]);
        let buffer = &foreign
            .unwrap_or_else(|| &self.memory[&Place::Input(input)])
            .buffer;
        self.gpu.scoped("writing an input", 0, || {
            self.gpu.write(buffer, &device_bytes(tensor));
        })
    }

    /// Uses the host application's buffer as the memory of a value.
    pub(crate) fn bind(
        &mut self,
        plan: &Plan,
        compiled: &Compiled,
        value: u32,
        buffer: HostBuffer,
    ) -> Result<()> {
        let class = plan.classes[value as usize];
        let bytes = compiled.bytes(value);
        self.foreign.insert(
            class,
            Bound {
                buffer: Buffer::foreign(buffer),
                bytes,
            },
        );
        for index in 0..self.launches.len() {
            let operands = &self.launches[index].1;
            let touches = |operand: &Operand| matches!(*operand, Operand::Value(v) if plan.classes[v as usize] == class);
            if operands.iter().any(touches) {
                let bound = self.bound(plan, compiled, operands);
                self.recording.rebind(&self.gpu, index, &bound)?;
            }
        }
        Ok(())
    }

    pub(crate) fn encode(&self, encoder: &mut CommandEncoder) {
        if let Some(checks) = &self.checks {
            self.gpu
                .write(&checks.first, &vec![0xff; checks.values.len() * 4]);
        }
        self.recording.encode(&self.gpu, encoder, None);
    }

    pub(crate) async fn profile(&self, poll: bool) -> Result<Vec<LaunchTiming>> {
        self.recording.profile(&self.gpu, poll).await
    }

    /// Runs so many times in one submission.
    pub(crate) fn run_repeatedly(&self, times: usize) -> Result<()> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        for _ in 0..times {
            self.encode(&mut encoder);
        }
        self.gpu.submit("repeated runs", encoder)
    }

    /// Runs once and reads the values named, all in one submission. With `poll` the calling thread waits for the device.
    pub(crate) async fn run(
        &mut self,
        plan: &Plan,
        compiled: &Compiled,
        read: &[u32],
        poll: bool,
    ) -> Result<Vec<Tensor>> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        self.encode(&mut encoder);
        let found = self.read_into(plan, compiled, read, encoder, poll).await?;
        if let Some(checks) = &self.checks {
            let bytes = self
                .gpu
                .read(&checks.first, checks.values.len() as u64 * 4, poll)
                .await?;
            let first: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
            if let Some(check) = first.iter().position(|&element| element != u32::MAX) {
                let value = compiled.descriptions[checks.values[check] as usize].clone();
                return Err(Error::NotFinite {
                    value,
                    element: first[check] as usize,
                });
            }
        }
        Ok(found)
    }

    /// Reads values as the last run left them.
    pub(crate) async fn read(
        &mut self,
        plan: &Plan,
        compiled: &Compiled,
        read: &[u32],
        poll: bool,
    ) -> Result<Vec<Tensor>> {
        let encoder = self.gpu.device.create_command_encoder(&Default::default());
        self.read_into(plan, compiled, read, encoder, poll).await
    }

    async fn read_into(
        &mut self,
        plan: &Plan,
        compiled: &Compiled,
        read: &[u32],
        mut encoder: CommandEncoder,
        poll: bool,
    ) -> Result<Vec<Tensor>> {
        // Asked for twice, copied once.
        let mut copied = read.to_vec();
        copied.sort_unstable();
        copied.dedup();
        for &value in &copied {
            let bytes = compiled.bytes(value).next_multiple_of(4);
            let source = self
                .bound(plan, compiled, &[Operand::Value(value)])
                .remove(0);
            if !self.staging.contains_key(&value) {
                self.staging.insert(value, self.gpu.staging(bytes)?);
            }
            encoder.copy_buffer_to_buffer(
                source.buffer.raw(),
                0,
                self.staging[&value].raw(),
                0,
                Some(bytes),
            );
        }
        self.gpu.submit("a run", encoder)?;
        let mapping = |value: &u32| self.gpu.map(&self.staging[value], compiled.bytes(*value));
        let mappings = copied.iter().map(mapping).collect::<Result<Vec<_>>>()?;
        let contents = self.gpu.contents(mappings, poll).await?;
        let contents: HashMap<u32, Vec<u8>> = copied.into_iter().zip(contents).collect();
        read.iter()
            .map(|value| {
                let (ty, storage) = (
                    &compiled.types[*value as usize],
                    compiled.storages[*value as usize],
                );
                tensor_of_bytes(&contents[value], ty, storage)
            })
            .collect()
    }

    /// Fills the pool with NaN, so that a kernel that reads what nobody wrote is found out.
    pub(crate) fn poison(&self, plan: &Plan) -> Result<()> {
        for (index, &bytes) in plan.pool.iter().enumerate() {
            let buffer = &self.memory[&Place::Pool(index)].buffer;
            let whole = bytes.next_multiple_of(crate::device::BUFFER_ALIGNMENT) as usize;
            self.gpu.scoped("poisoning the pool", bytes, || {
                self.gpu.write(buffer, &vec![0xff; whole]);
            })?;
        }
        Ok(())
    }
}

/// A host tensor's elements as kernels read them, floats in 32 bits.
fn device_bytes(tensor: &Tensor) -> Vec<u8> {
    match tensor.data() {
        TensorData::I32(data) => bytemuck::cast_slice(data).to_vec(),
        TensorData::F32(data) => bytemuck::cast_slice(data).to_vec(),
        TensorData::F64(_) => bytemuck::cast_slice(&tensor.to_f32()).to_vec(),
    }
}

pub(crate) fn tensor_of_bytes(bytes: &[u8], ty: &TensorType, storage: Storage) -> Result<Tensor> {
    let data = match (ty.dtype, storage) {
        (DType::I32, _) => TensorData::I32(bytemuck::pod_collect_to_vec(bytes)),
        (_, Storage::F16) => {
            let halves: Vec<f16> = bytemuck::pod_collect_to_vec(bytes);
            TensorData::F32(halves.to_f32_vec())
        }
        _ => TensorData::F32(bytemuck::pod_collect_to_vec(bytes)),
    };
    Tensor::new(ty.shape.clone(), data)
}
