//! A compiled graph: memory planned, pipelines built, ready to run any number of times.

use std::collections::HashMap;

use crate::device::{Capabilities, CommandEncoder, Device, HostBuffer, Kind, Launch, LaunchTiming};
use crate::error::{Error, Result};
use crate::graph::compiled::Compiled;
use crate::graph::gpu_executor::GpuExecutor;
use crate::graph::host_executor::HostExecutor;
use crate::graph::plan::{MemoryReport, Place, Plan, Target, plan};
use crate::graph::store::Memory;
use crate::graph::{Graph, ParameterStore, RANDOM, Storage, Value};
use crate::tensor::{DType, Tensor};

/// How to compile a graph.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionOptions {
    /// Fill the memory of computed values with NaN before the first run: a kernel that reads what nobody wrote then shows.
    pub poison: bool,
}

#[derive(Debug)]
enum Executor {
    Gpu(Box<GpuExecutor>),
    Host(HostExecutor),
}

/// A compiled graph on a device. A run records one compute pass into one submission; after the first run nothing is
/// allocated or compiled any more.
#[derive(Debug)]
pub struct Session {
    device: Device,
    plan: Plan,
    compiled: Compiled,
    executor: Executor,
    written: HashMap<u32, bool>,
    random: Option<Random>,
}

/// What the noise of the next run is made from.
#[derive(Clone, Copy, Debug)]
struct Random {
    input: u32,
    seed: u32,
    step: u32,
}

impl Graph {
    /// Plans the memory, builds the pipelines and binds the parameters of `store`, for the device that the store is on.
    ///
    /// # Errors
    /// [`Error::UnknownName`] or [`Error::TypeMismatch`] if the store lacks a parameter or holds another shape,
    /// [`Error::Limit`] or [`Error::OutOfMemory`] if the device is too small, [`Error::Gpu`] if it refuses a kernel.
    pub fn compile(&self, store: &ParameterStore) -> Result<Session> {
        self.compile_with(store, SessionOptions::default())
    }

    /// [`Graph::compile_with`] for an async caller. In a browser the other two do the same work, but the errors of kernels and memory
    /// come with the first call that is awaited after them.
    ///
    /// # Errors
    /// As [`Graph::compile`].
    pub async fn compile_async(
        &self,
        store: &ParameterStore,
        options: SessionOptions,
    ) -> Result<Session> {
        let session = self.compile_with(store, options)?;
        store.device().settle().await?;
        Ok(session)
    }

    /// [`Graph::compile`] with options.
    ///
    /// # Errors
    /// As [`Graph::compile`].
    pub fn compile_with(&self, store: &ParameterStore, options: SessionOptions) -> Result<Session> {
        let capabilities = match store.device().kind() {
            Kind::Gpu(gpu) => Some(gpu.capabilities()),
            Kind::Host { .. } => None,
        };
        self.compile_for(store, options, capabilities.as_ref())
    }

    /// [`Graph::compile_with`], the kernels chosen by these capabilities.
    pub(crate) fn compile_for(
        &self,
        store: &ParameterStore,
        options: SessionOptions,
        capabilities: Option<&Capabilities>,
    ) -> Result<Session> {
        let device = store.device().clone();
        let target = Target {
            capabilities,
            float_bytes: match device.kind() {
                Kind::Gpu(_) => 4,
                Kind::Host { float, .. } => float.bytes(),
            },
        };
        let plan = plan(self, target, self.storages_in(store)?)?;
        let compiled = self.compiled(&plan)?;
        let mut gpu_parameters = HashMap::new();
        let mut host_parameters = HashMap::new();
        for &index in &plan.parameters {
            let spec = &self.parameters[index];
            let (memory, stored) = store.memory(spec)?;
            if stored != plan.storages[self.names[&spec.name].index as usize] {
                return Err(Error::setting(
                    "precision",
                    format!("{stored:?}"),
                    format!(
                        "the storage of the parameter `{}` was changed while a graph was compiled",
                        spec.name
                    ),
                ));
            }
            match memory {
                Memory::Gpu(buffer) => _ = gpu_parameters.insert(index, buffer),
                Memory::Host(words) => _ = host_parameters.insert(index, words),
            }
        }
        let executor = match device.kind() {
            Kind::Gpu(gpu) => Executor::Gpu(Box::new(GpuExecutor::new(
                gpu,
                &plan,
                &compiled,
                &gpu_parameters,
            )?)),
            Kind::Host { float, checked } => Executor::Host(HostExecutor::new(
                *float,
                *checked,
                &plan,
                &compiled,
                host_parameters,
            )?),
        };
        let written = plan.inputs.iter().map(|&input| (input, false)).collect();
        let mut session = Session {
            device,
            plan,
            compiled,
            executor,
            written,
            random: None,
        };
        let random = session.compiled.inputs.get(RANDOM).copied();
        session.random = random
            .filter(|input| self.noises > 0 && session.written.contains_key(input))
            .map(|input| Random {
                input,
                seed: 0,
                step: 0,
            });
        session.write_random()?;
        if options.poison {
            session.poison()?;
        }
        Ok(session)
    }
}

impl Session {
    /// The device it runs on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What memory it needs.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.plan.memory
    }

    /// What a value's floats are stored in.
    ///
    /// # Errors
    /// [`Error::ForeignValue`] if the value is of another graph.
    pub fn storage(&self, value: Value) -> Result<Storage> {
        let index = self.index(value)?;
        Ok(self.compiled.storages[index as usize])
    }

    /// The kernels of a run, in order, as data; none on the CPU.
    #[must_use]
    pub fn launches(&self) -> Vec<&Launch> {
        match &self.executor {
            Executor::Gpu(gpu) => gpu.launches().collect(),
            Executor::Host(_) => Vec::new(),
        }
    }

    /// What the noise (dropout, jitter) of the next run is made from. Two runs with the same seed and step are equal bit for
    /// bit; each run, timed ones included, goes on to the next step by itself, so that no two have the same noise. A session
    /// starts at seed 0, step 0. Without effect if nothing in the session makes noise, or a host buffer is bound as its input.
    ///
    /// [`Session::encode`] cannot write: it uses the seed and step of this call, or those of the last run after it.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] if the device is gone.
    pub fn set_random(&mut self, seed: u32, step: u32) -> Result<()> {
        if let Some(random) = &mut self.random {
            (random.seed, random.step) = (seed, step);
        }
        self.write_random()
    }

    /// The seed and the step of the next run, as [`Session::set_random`] takes them; `None` if nothing makes noise. What a
    /// training that goes on later has to keep.
    #[must_use]
    pub fn random(&self) -> Option<(u32, u32)> {
        self.random.map(|random| (random.seed, random.step))
    }

    fn write_random(&mut self) -> Result<()> {
        let Some(Random { input, seed, step }) = self.random else {
            return Ok(());
        };
        self.written.insert(input, true);
        let words = Tensor::i32([2], vec![seed as i32, step as i32])?;
        self.write_memory(input, &words)
    }

    /// Writes the noise of this run, and goes on to the next step.
    fn next_random(&mut self) -> Result<()> {
        self.write_random()?;
        if let Some(random) = &mut self.random {
            random.step = random.step.wrapping_add(1);
        }
        Ok(())
    }

    fn write_memory(&mut self, input: u32, tensor: &Tensor) -> Result<()> {
        match &mut self.executor {
            Executor::Gpu(gpu) => gpu.write(&self.plan, input, tensor),
            Executor::Host(host) => host.write(Place::Input(input), tensor),
        }
    }

    /// Writes an input by name. It stays until it is written again.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if there is no such input; and as [`Session::write`].
    pub fn set(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let index = self.compiled.inputs.get(name).copied();
        let index = index.ok_or_else(|| Error::UnknownName {
            kind: "input",
            name: name.to_owned(),
        })?;
        self.write(
            Value {
                graph: self.compiled.graph,
                index,
            },
            tensor,
        )
    }

    /// Writes an input. It stays until it is written again. An input bound to a buffer of the host's is written there, which needs
    /// `BufferUsages::COPY_DST`.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] if the shape or type is another, [`Error::IndexOutOfRange`] if an index (a label, a token id) is out of
    /// range, [`Error::NotFinite`] for a NaN in checked mode, [`Error::UnknownName`] if the value is not an input.
    pub fn write(&mut self, value: Value, tensor: &Tensor) -> Result<()> {
        let index = self.index(value)?;
        if self.random.is_some_and(|random| random.input == index)
            && let Some(&[seed, step]) = tensor.as_i32()
        {
            return self.set_random(seed as u32, step as u32);
        }
        let description = || self.compiled.descriptions[index as usize].clone();
        if !self.compiled.inputs.values().any(|&input| input == index) {
            return Err(Error::UnknownName {
                kind: "input",
                name: description(),
            });
        }
        let expected = &self.compiled.types[index as usize];
        let integers = tensor.dtype() == DType::I32;
        if tensor.shape() != &expected.shape || integers != (expected.dtype == DType::I32) {
            return Err(Error::TypeMismatch {
                name: description(),
                expected: expected.clone(),
                found: tensor.ty(),
            });
        }
        for &(limit, ignored) in self.compiled.ranges.get(&index).into_iter().flatten() {
            let outside =
                |&&found: &&i32| Some(found) != ignored && (found < 0 || found as usize >= limit);
            let indices = tensor.as_i32().unwrap_or_default();
            if let Some((position, &found)) =
                indices.iter().enumerate().find(|(_, found)| outside(found))
            {
                return Err(Error::IndexOutOfRange {
                    name: description(),
                    position,
                    index: found,
                    limit,
                    ignored,
                });
            }
        }
        if self.device.is_checked()
            && let Some(element) = tensor.first_not_finite()
        {
            return Err(Error::NotFinite {
                value: description(),
                element,
            });
        }
        // An input that nothing uses has no memory and needs none.
        let Some(written) = self.written.get_mut(&index) else {
            return Ok(());
        };
        *written = true;
        self.write_memory(index, tensor)
    }

    /// Uses a buffer of the host application as the memory of an input or an output, instead of the session's own. It must
    /// have `BufferUsages::STORAGE`, be at least as large as the value rounded up to 16 bytes, and not serve two values. Inputs are f32;
    /// an output is what [`Session::storage`] says.
    ///
    /// # Errors
    /// [`Error::Limit`] if it is too small, [`Error::NotKept`] if the value is neither an input nor an output,
    /// [`Error::NoAdapter`] on the CPU, [`Error::Gpu`] if wgpu refuses it.
    pub fn bind(&mut self, value: Value, buffer: &HostBuffer) -> Result<()> {
        let index = self.index(value)?;
        let place = self.plan.places[index as usize];
        let is_input = matches!(place, Some(Place::Input(_)));
        let is_output =
            self.compiled.outputs.contains(&index) && matches!(place, Some(Place::Pool(_)));
        if !is_input && !is_output {
            return Err(Error::NotKept {
                value: self.compiled.descriptions[index as usize].clone(),
            });
        }
        let needed = self
            .compiled
            .bytes(index)
            .next_multiple_of(crate::device::BUFFER_ALIGNMENT);
        if buffer.size() < needed {
            return Err(Error::Limit {
                thing: format!(
                    "{}, bound to the host's buffer",
                    self.compiled.descriptions[index as usize]
                ),
                needed,
                limit: buffer.size(),
                unit: "bytes",
            });
        }
        let Executor::Gpu(gpu) = &mut self.executor else {
            return Err(Error::NoAdapter {
                requested: "a host buffer".to_owned(),
                reason: "this session runs on the CPU".to_owned(),
            });
        };
        gpu.bind(&self.plan, &self.compiled, index, buffer.clone())?;
        // A view of an input is the input.
        if let Some(Place::Input(input)) = place {
            self.written.insert(input, true);
            self.random = self.random.filter(|random| random.input != input);
        }
        Ok(())
    }

    /// Runs once: one compute pass, one submission. On a GPU it returns when the work is submitted, not when it is done.
    ///
    /// # Errors
    /// [`Error::MissingInput`] if an input was never written, [`Error::DeviceLost`], [`Error::OutOfMemory`], in checked mode
    /// [`Error::NotFinite`], and in a browser [`Error::WouldBlock`].
    pub fn run(&mut self) -> Result<()> {
        self.device.may_wait("Session::run", "Session::run_async")?;
        pollster::block_on(self.run_with(&[], true)).map(drop)
    }

    /// [`Session::run`] for an async caller.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub async fn run_async(&mut self) -> Result<()> {
        self.run_with(&[], false).await.map(drop)
    }

    /// Runs so many times in one submission, on the same inputs and with the same noise: to time work without the cost of submitting
    /// it. Checked mode does not look for NaN on this path.
    ///
    /// # Errors
    /// [`Error::MissingInput`] if an input was never written, [`Error::DeviceLost`].
    pub fn run_repeatedly(&mut self, times: usize) -> Result<()> {
        self.ready()?;
        self.next_random()?;
        match &mut self.executor {
            Executor::Gpu(gpu) => gpu.run_repeatedly(times),
            Executor::Host(host) => {
                (0..times).try_for_each(|_| host.run(&self.plan, &self.compiled))
            }
        }
    }

    /// Runs once and reads these outputs, all in one submission.
    ///
    /// # Errors
    /// As [`Session::run`], and [`Error::NotKept`] for a value that is not an output.
    pub fn run_reading(&mut self, read: &[Value]) -> Result<Vec<Tensor>> {
        self.device
            .may_wait("Session::run_reading", "Session::run_reading_async")?;
        pollster::block_on(self.run_with(read, true))
    }

    /// [`Session::run_reading`] for an async caller; the only way in a browser.
    ///
    /// # Errors
    /// As [`Session::run_reading`].
    pub async fn run_reading_async(&mut self, read: &[Value]) -> Result<Vec<Tensor>> {
        self.run_with(read, false).await
    }

    async fn run_with(&mut self, read: &[Value], poll: bool) -> Result<Vec<Tensor>> {
        self.ready()?;
        let indices = self.kept(read)?;
        self.next_random()?;
        match &mut self.executor {
            Executor::Gpu(gpu) => gpu.run(&self.plan, &self.compiled, &indices, poll).await,
            Executor::Host(host) => {
                host.run(&self.plan, &self.compiled)?;
                self.host_values(&indices)
            }
        }
    }

    /// Reads an output as the last run left it, once that run is done. Costs a submission of its own; a loop that reads every
    /// step does better with [`Session::run_reading`].
    ///
    /// # Errors
    /// [`Error::NotKept`] if it is not an output, [`Error::DeviceLost`].
    pub fn read(&mut self, value: Value) -> Result<Tensor> {
        self.device
            .may_wait("Session::read", "Session::read_async")?;
        pollster::block_on(self.read_with(value, true))
    }

    /// [`Session::read`] for an async caller.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub async fn read_async(&mut self, value: Value) -> Result<Tensor> {
        self.read_with(value, false).await
    }

    async fn read_with(&mut self, value: Value, poll: bool) -> Result<Tensor> {
        let indices = self.kept(&[value])?;
        let mut tensors = match &mut self.executor {
            Executor::Gpu(gpu) => gpu.read(&self.plan, &self.compiled, &indices, poll).await?,
            Executor::Host(_) => self.host_values(&indices)?,
        };
        Ok(tensors.remove(0))
    }

    /// Records a run into the host application's encoder: one compute pass, submitted whenever the application submits.
    /// Checked mode does not look for NaN on this path, and noise is as [`Session::set_random`] says. In a browser the session and its store
    /// must live until the encoder is submitted: their memory is freed with them.
    ///
    /// # Errors
    /// [`Error::MissingInput`] if an input was neither written nor bound, [`Error::NoAdapter`] on the CPU.
    pub fn encode(&self, encoder: &mut CommandEncoder) -> Result<()> {
        self.ready()?;
        match &self.executor {
            Executor::Gpu(gpu) => {
                gpu.encode(encoder);
                Ok(())
            }
            Executor::Host(_) => Err(Error::NoAdapter {
                requested: "a command encoder".to_owned(),
                reason: "this session runs on the CPU".to_owned(),
            }),
        }
    }

    /// Runs once and times every launch on the device.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the adapter has no timestamps inside passes, [`Error::NoAdapter`] on the CPU.
    pub fn profile(&mut self) -> Result<Vec<LaunchTiming>> {
        self.device
            .may_wait("Session::profile", "Session::profile_async")?;
        pollster::block_on(self.profile_with(true))
    }

    /// [`Session::profile`] for an async caller.
    ///
    /// # Errors
    /// As [`Session::profile`].
    pub async fn profile_async(&mut self) -> Result<Vec<LaunchTiming>> {
        self.profile_with(false).await
    }

    async fn profile_with(&mut self, poll: bool) -> Result<Vec<LaunchTiming>> {
        self.ready()?;
        self.next_random()?;
        match &self.executor {
            Executor::Gpu(gpu) => gpu.profile(poll).await,
            Executor::Host(_) => Err(Error::NoAdapter {
                requested: "launch timings".to_owned(),
                reason: "this session runs on the CPU".to_owned(),
            }),
        }
    }

    /// Fills the memory of computed values with NaN.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] if the device is gone.
    pub fn poison(&mut self) -> Result<()> {
        match &mut self.executor {
            Executor::Gpu(gpu) => gpu.poison(&self.plan),
            Executor::Host(host) => {
                host.poison(self.plan.pool.len());
                Ok(())
            }
        }
    }

    fn ready(&self) -> Result<()> {
        match self.written.iter().find(|(_, written)| !**written) {
            Some((&input, _)) => {
                let named = self
                    .compiled
                    .inputs
                    .iter()
                    .find(|(_, index)| **index == input);
                Err(Error::MissingInput {
                    name: named.map(|(name, _)| name.clone()).unwrap_or_default(),
                })
            }
            None => Ok(()),
        }
    }

    fn index(&self, value: Value) -> Result<u32> {
        if value.graph != self.compiled.graph {
            return Err(Error::ForeignValue { op: "session" });
        }
        if value.index as usize >= self.compiled.types.len() {
            return Err(Error::NotKept {
                value: "a value added to the graph after the session was compiled".to_owned(),
            });
        }
        Ok(value.index)
    }

    /// The values' indices, if all of them can be read.
    fn kept(&self, values: &[Value]) -> Result<Vec<u32>> {
        values
            .iter()
            .map(|&value| {
                let index = self.index(value)?;
                let kept = self.compiled.outputs.contains(&index)
                    && self.plan.places[index as usize].is_some();
                if kept {
                    Ok(index)
                } else {
                    Err(Error::NotKept {
                        value: self.compiled.descriptions[index as usize].clone(),
                    })
                }
            })
            .collect()
    }

    fn host_values(&self, indices: &[u32]) -> Result<Vec<Tensor>> {
        let Executor::Host(host) = &self.executor else {
            return Ok(Vec::new());
        };
        indices
            .iter()
            .map(|&index| match self.plan.places[index as usize] {
                Some(place) => host.read(
                    place,
                    &self.compiled.types[index as usize],
                    self.compiled.storages[index as usize],
                ),
                None => Err(Error::NotKept {
                    value: self.compiled.descriptions[index as usize].clone(),
                }),
            })
            .collect()
    }
}
