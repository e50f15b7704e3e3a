//! Parameters by name, on one device, shared by any number of sessions (training, evaluation, generation).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::device::{Buffer, Device, HostFloat, Kind};
use crate::error::{Error, Result};
use crate::graph::gpu_executor::tensor_of_bytes;
use crate::graph::host_executor::{host_words, tensor_of_words};
use crate::graph::{Graph, Init, ParameterSpec, Storage};
use crate::ops::HostBuffer;
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// In front of a parameter's name: its copy in f32, which an optimiser changes where the parameter itself is stored in 16 bits.
pub(crate) const MASTER: &str = "adamw.master.";

/// Where a parameter's elements are.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    Gpu(Buffer),
    Host(Arc<Mutex<HostBuffer>>),
}

#[derive(Clone, Debug)]
struct Entry {
    ty: TensorType,
    storage: Storage,
    memory: Memory,
}

/// Parameters by name, on one device. Cheap to clone; clones share the parameters.
#[derive(Clone, Debug)]
pub struct ParameterStore {
    device: Device,
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
}

impl ParameterStore {
    /// An empty store on a device.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            entries: Arc::default(),
        }
    }

    /// The device that the parameters live on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Creates every parameter of the graph that the store does not have yet, as the graph says it starts, in the storage that its
    /// precision says. The values depend on `seed` and on the parameter's name alone, on any device. After an error the store has what
    /// it had before.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if a parameter with [`Init::Provided`] is missing, [`Error::TypeMismatch`] if one is there with
    /// another shape, [`Error::OutOfMemory`] or [`Error::Limit`] if the device cannot hold one.
    pub fn initialize(&self, graph: &Graph, seed: u64) -> Result<()> {
        self.device.may_wait(
            "ParameterStore::initialize",
            "ParameterStore::initialize_async",
        )?;
        pollster::block_on(self.initialize_with(graph, seed, true))
    }

    /// [`ParameterStore::initialize`] for an async caller: master copies of parameters that are there already are read from the device.
    ///
    /// # Errors
    /// As [`ParameterStore::initialize`].
    pub async fn initialize_async(&self, graph: &Graph, seed: u64) -> Result<()> {
        self.initialize_with(graph, seed, false).await
    }

    async fn initialize_with(&self, graph: &Graph, seed: u64, poll: bool) -> Result<()> {
        let mut made = Vec::new();
        let mut outcome = self.create_missing(graph, seed, poll, &mut made).await;
        if outcome.is_ok() {
            outcome = self.device.settle().await;
        }
        if outcome.is_err() {
            // In a browser there may be no memory behind them.
            for name in made {
                self.remove(name);
            }
        }
        outcome
    }

    /// Says in `made` what it has put into the store.
    async fn create_missing<'a>(
        &self,
        graph: &'a Graph,
        seed: u64,
        poll: bool,
        made: &mut Vec<&'a str>,
    ) -> Result<()> {
        for spec in graph.parameters() {
            match self.ty(&spec.name) {
                Some(found) if found == spec.ty => {}
                Some(found) => {
                    return Err(Error::TypeMismatch {
                        name: spec.name.clone(),
                        expected: spec.ty.clone(),
                        found,
                    });
                }
                None => {
                    let tensor = match &spec.init {
                        Init::Copy { of } => self.read_with(of, poll).await?,
                        _ => start(spec, seed)?,
                    };
                    self.put(&spec.name, &tensor, spec.storage)?;
                    made.push(&spec.name);
                }
            }
        }
        Ok(())
    }

    /// Puts a parameter into the store, in 32 bits; one of that name is overwritten in place, in the storage that it has, so that
    /// sessions see it. Its master copy, where an optimiser has one, is overwritten too.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] if one of that name has another shape; [`Error::OutOfMemory`] or [`Error::Limit`] if the device
    /// cannot hold it; [`Error::Setting`] if it is not of floats.
    pub fn insert(&self, name: &str, tensor: &Tensor) -> Result<()> {
        self.insert_as(name, tensor, Storage::F32)
    }

    /// [`ParameterStore::insert`] for a parameter that, if it is new, is stored as `storage` says. One that is there keeps its storage.
    ///
    /// # Errors
    /// As [`ParameterStore::insert`].
    pub fn insert_as(&self, name: &str, tensor: &Tensor, storage: Storage) -> Result<()> {
        self.put(name, tensor, storage)?;
        let master = format!("{MASTER}{name}");
        if self.storage(&master).is_some() {
            self.put(&master, tensor, Storage::F32)?;
        }
        Ok(())
    }

    /// [`ParameterStore::insert_as`] for this parameter alone.
    pub(crate) fn put(&self, name: &str, tensor: &Tensor, storage: Storage) -> Result<()> {
        if tensor.dtype() == DType::I32 {
            return Err(Error::setting("parameter", name, "parameters are floats"));
        }
        let ty = TensorType::f32(tensor.shape());
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(name) {
            if entry.ty != ty {
                return Err(Error::TypeMismatch {
                    name: name.to_owned(),
                    expected: entry.ty.clone(),
                    found: ty,
                });
            }
            return self.write(entry, tensor);
        }
        let entry = self.entry_for(name, ty, storage)?;
        self.write(&entry, tensor)?;
        entries.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Brings every parameter of the graph that the store has into the storage that the graph's precision says; after an error all are
    /// as they were. Sessions compiled before go on with the memory they have. A master copy stays if it is the parameter but for rounding; else it becomes the
    /// parameter, with the digits that 16 bits have no room for.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] if the store has one in another shape,
    /// [`Error::OutOfMemory`] or [`Error::Limit`] if the device cannot hold one, [`Error::DeviceLost`] if it is gone.
    pub fn convert(&self, graph: &Graph) -> Result<()> {
        self.device
            .may_wait("ParameterStore::convert", "ParameterStore::convert_async")?;
        pollster::block_on(self.convert_with(graph, true))
    }

    /// [`ParameterStore::convert`] for an async caller.
    ///
    /// # Errors
    /// As [`ParameterStore::convert`].
    pub async fn convert_async(&self, graph: &Graph) -> Result<()> {
        self.convert_with(graph, false).await
    }

    async fn convert_with(&self, graph: &Graph, poll: bool) -> Result<()> {
        let mut replaced = Vec::new();
        let mut outcome = self.convert_stored(graph, poll, &mut replaced).await;
        if outcome.is_ok() {
            outcome = self.device.settle().await;
        }
        if outcome.is_err() {
            // In a browser there may be no memory behind the new ones.
            self.entries
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(replaced);
        }
        outcome
    }

    /// Says in `replaced` what was there before.
    async fn convert_stored(
        &self,
        graph: &Graph,
        poll: bool,
        replaced: &mut Vec<(String, Entry)>,
    ) -> Result<()> {
        for spec in graph.parameters() {
            if self
                .storage(&spec.name)
                .is_some_and(|stored| stored != spec.storage)
            {
                // Of the shape that the graph says, or else an error.
                self.memory(spec)?;
                let tensor = self.read_with(&spec.name, poll).await?;
                let entry = self.entry_for(&spec.name, spec.ty.clone(), spec.storage)?;
                self.write(&entry, &tensor)?;
                let before = self
                    .entries
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(spec.name.clone(), entry);
                replaced.extend(before.map(|before| (spec.name.clone(), before)));
                let master = format!("{MASTER}{}", spec.name);
                if self.storage(&master).is_some()
                    && !rounds_to(&self.read_with(&master, poll).await?, &tensor)
                {
                    self.put(&master, &tensor, Storage::F32)?;
                }
            }
        }
        Ok(())
    }

    /// Memory for a parameter, not written yet.
    fn entry_for(&self, name: &str, ty: TensorType, storage: Storage) -> Result<Entry> {
        let memory = match self.device.kind() {
            Kind::Gpu(gpu) => {
                let bytes = (ty.elements() * storage.bytes()) as u64;
                Memory::Gpu(gpu.allocate(&format!("the parameter `{name}`"), bytes)?)
            }
            Kind::Host { .. } => Memory::Host(Arc::default()),
        };
        Ok(Entry {
            ty,
            storage,
            memory,
        })
    }

    fn write(&self, entry: &Entry, tensor: &Tensor) -> Result<()> {
        match (&entry.memory, self.device.kind()) {
            (Memory::Gpu(buffer), Kind::Gpu(gpu)) => {
                gpu.scoped("writing a parameter", 0, || match entry.storage {
                    Storage::F32 => gpu.write(buffer, bytemuck::cast_slice(&tensor.to_f32())),
                    Storage::F16 => {
                        let mut halves = Vec::<f16>::from_f32_slice(&tensor.to_f32());
                        // wgpu copies whole words.
                        halves.resize(halves.len().next_multiple_of(2), f16::ZERO);
                        gpu.write(buffer, bytemuck::cast_slice(halves.reinterpret_cast()));
                    }
                })
            }
            (Memory::Host(words), Kind::Host { float, .. }) => {
                *words.lock().unwrap_or_else(PoisonError::into_inner) =
                    host_words(tensor, *float, entry.storage)?;
                Ok(())
            }
            _ => unreachable!("an entry is made on the store's own device"),
        }
    }

    /// The names, in alphabetical order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect()
    }

    /// The type of a parameter, if it is there.
    #[must_use]
    pub fn ty(&self, name: &str) -> Option<TensorType> {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .map(|entry| entry.ty.clone())
    }

    /// What a parameter is stored in, if it is there.
    #[must_use]
    pub fn storage(&self, name: &str) -> Option<Storage> {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .map(|entry| entry.storage)
    }

    /// Makes a parameter of another store one of this store too, under the same name and in the same memory: whichever
    /// changes it changes it for both. How several adapters share one base that is on the device once.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if the other store does not have it, [`Error::DuplicateName`] if this one has one of that name,
    /// [`Error::Setting`] if the stores are on different devices.
    pub fn share(&self, name: &str, from: &Self) -> Result<()> {
        if !self.device.is_same(&from.device) {
            return Err(Error::setting(
                "parameter",
                name,
                "memory can only be shared between stores on the same device",
            ));
        }
        let entry = from.entry(name)?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.contains_key(name) {
            return Err(Error::DuplicateName {
                name: name.to_owned(),
                reason: "a parameter of this store".to_owned(),
            });
        }
        entries.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Removes a parameter; sessions that use it keep it alive.
    pub fn remove(&self, name: &str) {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }

    /// A copy of a parameter on the host, once everything submitted so far is done.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not there, [`Error::DeviceLost`] if the device is gone.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.device
            .may_wait("ParameterStore::read", "ParameterStore::read_async")?;
        pollster::block_on(self.read_with(name, true))
    }

    /// [`ParameterStore::read`] for an async caller.
    ///
    /// # Errors
    /// As [`ParameterStore::read`].
    pub async fn read_async(&self, name: &str) -> Result<Tensor> {
        self.read_with(name, false).await
    }

    async fn read_with(&self, name: &str, poll: bool) -> Result<Tensor> {
        let entry = self.entry(name)?;
        match (&entry.memory, self.device.kind()) {
            (Memory::Gpu(buffer), Kind::Gpu(gpu)) => {
                let bytes = entry.ty.elements() * entry.storage.bytes();
                let bytes = gpu.read(buffer, bytes as u64, poll).await?;
                tensor_of_bytes(&bytes, &entry.ty, entry.storage)
            }
            (Memory::Host(words), Kind::Host { float, .. }) => {
                let words = words.lock().unwrap_or_else(PoisonError::into_inner);
                tensor_of_words(&words, &entry.ty, *float, entry.storage)
            }
            _ => unreachable!("an entry is made on the store's own device"),
        }
    }

    fn entry(&self, name: &str) -> Result<Entry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .get(name)
            .cloned()
            .ok_or_else(|| Error::UnknownName {
                kind: "parameter",
                name: name.to_owned(),
            })
    }

    /// The memory of a parameter that a graph declares, and what is stored in it.
    pub(crate) fn memory(&self, spec: &ParameterSpec) -> Result<(Memory, Storage)> {
        let entry = self.entry(&spec.name)?;
        if entry.ty != spec.ty {
            return Err(Error::TypeMismatch {
                name: spec.name.clone(),
                expected: spec.ty.clone(),
                found: entry.ty,
            });
        }
        Ok((entry.memory, entry.storage))
    }
}

/// Whether a master copy is that of a parameter: equal once both are in 16 bits.
pub(crate) fn rounds_to(master: &Tensor, parameter: &Tensor) -> bool {
    let halves = |tensor: &Tensor| Vec::<f16>::from_f32_slice(&tensor.to_f32());
    halves(master) == halves(parameter)
}

/// A parameter's first value.
fn start(spec: &ParameterSpec, seed: u64) -> Result<Tensor> {
    let count = spec.ty.elements();
    // One stream a parameter: a layer starts the same whatever stands beside it. FNV-1a of the name picks the stream.
    let stream = spec
        .name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    // In (0, 1), from 24 random bits.
    let mut unit = || ((generator.next_u32() >> 8) as f32 + 0.5) * (1.0 / 16_777_216.0);
    if let Init::Given(tensor) = &spec.init {
        return Ok(tensor.clone());
    }
    let mut data = Vec::new();
    data.try_reserve_exact(count)
        .map_err(|_| Error::OutOfMemory {
            thing: format!("the parameter `{}`", spec.name),
            bytes: spec.ty.bytes() as u64,
        })?;
    match spec.init {
        Init::Zeros => data.resize(count, 0.0),
        Init::Ones => data.resize(count, 1.0),
        Init::Uniform { bound } => data.extend((0..count).map(|_| (2.0 * unit() - 1.0) * bound)),
        Init::Normal { deviation } => data.extend((0..count).map(|_| {
            deviation * (-2.0 * unit().ln()).sqrt() * (std::f32::consts::TAU * unit()).cos()
        })),
        Init::Provided | Init::Copy { .. } | Init::Given(_) => {
            return Err(Error::UnknownName {
                kind: "provided parameter",
                name: spec.name.clone(),
            });
        }
    }
    Tensor::new(spec.ty.shape.clone(), TensorData::F32(data))
}

impl HostFloat {
    /// The size of one float.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}
