//! Parameters by name, on one device, shared by any number of sessions (training, evaluation, generation).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::device::{Buffer, Device, Kind, Precision};
use crate::error::{Error, Result};
use crate::graph::host_executor::{host_words, tensor_of_words};
use crate::graph::{Graph, Init, ParameterSpec};
use crate::ops::HostBuffer;
use crate::tensor::{DType, Tensor, TensorData, TensorType};

/// Where a parameter's elements are.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    Gpu(Buffer),
    Host(Arc<Mutex<HostBuffer>>),
}

#[derive(Clone, Debug)]
struct Entry {
    ty: TensorType,
    storage: Storage,
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

    /// Creates every parameter of the graph that the store does not have yet, as the graph says it starts. The values
    /// depend on `seed` and on the parameter's name alone, on any device.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if a parameter with [`Init::Provided`] is missing, [`Error::TypeMismatch`] if one is there with
    /// another shape, [`Error::OutOfMemory`] or [`Error::Limit`] if the device cannot hold one.
    pub fn initialize(&self, graph: &Graph, seed: u64) -> Result<()> {
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
                None => self.insert(&spec.name, &start(spec, seed)?)?,
            }
        }
        Ok(())
    }

    /// Puts a parameter into the store; one of that name is overwritten in place, so that sessions see it.
    ///
    /// # Errors
    /// [`Error::TypeMismatch`] if one of that name has another shape; [`Error::OutOfMemory`] or [`Error::Limit`] if the device
    /// cannot hold it; [`Error::Setting`] if it is not of floats.
    pub fn insert(&self, name: &str, tensor: &Tensor) -> Result<()> {
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
            return self.write(&entry.storage, tensor);
        }
        let storage = match self.device.kind() {
            Kind::Gpu(gpu) => {
                Storage::Gpu(gpu.allocate(&format!("the parameter `{name}`"), ty.bytes() as u64)?)
            }
            Kind::Host { .. } => Storage::Host(Arc::default()),
        };
        self.write(&storage, tensor)?;
        entries.insert(name.to_owned(), Entry { ty, storage });
        Ok(())
    }

    fn write(&self, storage: &Storage, tensor: &Tensor) -> Result<()> {
        match (storage, self.device.kind()) {
            (Storage::Gpu(buffer), Kind::Gpu(gpu)) => gpu.scoped("writing a parameter", 0, || {
                gpu.write(buffer, bytemuck::cast_slice(&tensor.to_f32()));
            }),
            (Storage::Host(words), Kind::Host { precision, .. }) => {
                *words.lock().unwrap_or_else(PoisonError::into_inner) =
                    host_words(tensor, *precision);
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
        match (&entry.storage, self.device.kind()) {
            (Storage::Gpu(buffer), Kind::Gpu(gpu)) => {
                let bytes = gpu.read(buffer, entry.ty.bytes() as u64, poll).await?;
                Tensor::f32(&entry.ty.shape, bytemuck::pod_collect_to_vec(&bytes))
            }
            (Storage::Host(words), Kind::Host { precision, .. }) => {
                let words = words.lock().unwrap_or_else(PoisonError::into_inner);
                tensor_of_words(&words, &entry.ty, *precision)
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

    /// The memory of a parameter that a graph declares.
    pub(crate) fn storage(&self, spec: &ParameterSpec) -> Result<Storage> {
        let entry = self.entry(&spec.name)?;
        if entry.ty != spec.ty {
            return Err(Error::TypeMismatch {
                name: spec.name.clone(),
                expected: spec.ty.clone(),
                found: entry.ty,
            });
        }
        Ok(entry.storage)
    }
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
    let data = match spec.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Uniform { bound } => (0..count).map(|_| (2.0 * unit() - 1.0) * bound).collect(),
        Init::Normal { deviation } => (0..count)
            .map(|_| {
                deviation * (-2.0 * unit().ln()).sqrt() * (std::f32::consts::TAU * unit()).cos()
            })
            .collect(),
        Init::Provided => {
            return Err(Error::UnknownName {
                kind: "provided parameter",
                name: spec.name.clone(),
            });
        }
    };
    Tensor::new(spec.ty.shape.clone(), TensorData::F32(data))
}

impl Precision {
    pub(crate) fn float_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}
