//! Measuring which kernel is the fastest for each operation of a graph, where there are several.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{Capabilities, Device, KernelChoices, Kind};
use crate::error::{Error, Result};
use crate::graph::halves::{behind_key, storages, stored_types};
use crate::graph::plan::live_nodes;
use crate::graph::{Graph, Init, ParameterStore, Precision, Session, SessionOptions, Storage};
use crate::ops::{Choice, LaunchTypes, Op};
use crate::tensor::{DType, Tensor, TensorType};

/// At least this many samples of every kernel, and for at least this long.
const SAMPLES: usize = 5;
const SPAN: Duration = Duration::from_millis(100);
/// What one sample should take: far more than a submission.
const SAMPLE_SECONDS: f64 = 0.01;
/// The operation's own rule stands unless another kernel takes less than this share of its time: less is noise.
const WORTHWHILE: f64 = 0.97;

/// What the kernels of one operation took.
#[derive(Clone, Debug, PartialEq)]
pub struct TunedOperation {
    /// The operation and its sizes, as [`Choice::key`] has them.
    pub key: String,
    /// The kernels and the seconds that a launch of each takes, that of the operation's own rule first; `None` for one that the driver
    /// refused.
    pub kernels: Vec<(&'static str, Option<f64>)>,
    /// The kernel that was chosen.
    pub chosen: &'static str,
}

impl TunedOperation {
    /// The seconds by the operation's own rule, divided by those of the kernel chosen.
    #[must_use]
    pub fn gain(&self) -> Option<f64> {
        let seconds = |name: &str| {
            let mut kernels = self.kernels.iter();
            kernels
                .find(|(kernel, _)| *kernel == name)
                .and_then(|(_, seconds)| *seconds)
        };
        let own = self.kernels.first().and_then(|(kernel, _)| seconds(kernel));
        Some(own? / seconds(self.chosen)?)
    }
}

/// What [`Device::tune`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// The operations that had a choice, one of each size.
    pub operations: Vec<TunedOperation>,
}

impl Tuning {
    /// What was chosen, for [`Device::choose_kernels`] and
    /// [`TunedKernels::insert`](crate::device::TunedKernels::insert).
    #[must_use]
    pub fn choices(&self) -> KernelChoices {
        let mut choices = KernelChoices::default();
        for operation in &self.operations {
            choices.insert(operation.key.as_str(), operation.chosen);
        }
        choices
    }
}

/// An operation to be measured, with the types and storages of its operands.
struct Measured {
    op: Arc<dyn Op>,
    choice: Choice,
    operands: Vec<(TensorType, Storage)>,
    /// For the operands that are integers.
    integers: Vec<Tensor>,
    activations: Storage,
}

impl Device {
    /// Measures, for every operation of the graph that has several kernels for its sizes, which of them is the fastest on this
    /// device, each by itself on random operands. Nothing is changed: the result is to be given to [`Device::choose_kernels`], or saved with
    /// [`TunedKernels`](crate::device::TunedKernels). To be called while nothing else uses the device; takes about half a second an operation.
    /// On the CPU executor there is nothing to choose.
    ///
    /// ```
    /// use rankmix::device::TunedKernels;
    /// use rankmix::{Device, Graph, TensorType};
    ///
    /// # fn main() -> rankmix::Result<()> {
    /// # let device = Device::cpu();
    /// let mut graph = Graph::new();
    /// let [x, w] = [("x", [64, 128]), ("w", [32, 128])].map(|(name, dims)| graph.input(name, TensorType::f32(dims)));
    /// let y = graph.matmul_nt(x?, w?)?;
    /// graph.output(y)?;
    ///
    /// let choices = device.tune(&graph)?.choices();
    /// device.choose_kernels(choices.clone());
    /// if let Some(adapter) = device.adapter() {
    ///     let mut file = TunedKernels::default();
    ///     file.insert(adapter, &choices);
    ///     file.save("kernels.json")?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::WouldBlock`] in a browser, whose choices can be made natively on the same adapter; [`Error::OutOfMemory`] or
    /// [`Error::DeviceLost`].
    pub fn tune(&self, graph: &Graph) -> Result<Tuning> {
        self.may_wait("Device::tune", "nothing: load the choices of a native run")?;
        let Kind::Gpu(gpu) = self.kind() else {
            return Ok(Tuning::default());
        };
        let capabilities = Capabilities {
            kernels: KernelChoices::default(),
            ..gpu.capabilities()
        };
        let mut operations = Vec::new();
        for measured in graph.choices(&capabilities)? {
            operations.push(measured.tune(self, &capabilities)?);
        }
        Ok(Tuning { operations })
    }
}

impl Graph {
    /// What [`Device::tune`] would choose between on a device with these capabilities: the operations that have several kernels for their
    /// sizes, one of each size.
    ///
    /// # Errors
    /// [`Error::Limit`] if the shapes are more than the device can do.
    pub fn kernel_choices(&self, capabilities: &Capabilities) -> Result<Vec<Choice>> {
        let measured = self.choices(capabilities)?.into_iter();
        Ok(measured.map(|measured| measured.choice).collect())
    }

    /// The operations that have a choice, one of each key, in the order of the graph. Those that read integers and do not say which are left out:
    /// random ones would be no work like the real.
    fn choices(&self, capabilities: &Capabilities) -> Result<Vec<Measured>> {
        let stored = storages(self, |index| self.parameters[index].storage);
        let mut found = BTreeMap::new();
        for (position, &node) in live_nodes(self).iter().enumerate() {
            let node = &self.nodes[node];
            let [operands, results] =
                [&node.inputs, &node.outputs].map(|values| stored_types(self, &stored, values));
            let types = |values: &[(TensorType, Storage)]| -> Vec<TensorType> {
                values.iter().map(|(ty, _)| ty.clone()).collect()
            };
            let (inputs, outputs) = (types(&operands), types(&results));
            let io = LaunchTypes {
                inputs: &inputs,
                outputs: &outputs,
            };
            let Some(mut choice) = node.op.choice(io, capabilities)? else {
                continue;
            };
            if choice.kernels.len() < 2 {
                continue;
            }
            let integers = match node.op.sample_integers(&inputs)? {
                Some(integers) => integers,
                None if inputs.iter().all(|ty| ty.dtype == DType::F32) => Vec::new(),
                None => continue,
            };
            choice.key += &behind_key(&operands, &results);
            found.entry(choice.key.clone()).or_insert_with(|| {
                let measured = Measured {
                    op: Arc::clone(&node.op),
                    choice,
                    operands,
                    integers,
                    activations: results
                        .first()
                        .map_or(Storage::F32, |(_, storage)| *storage),
                };
                (position, measured)
            });
        }
        let mut found: Vec<_> = found.into_values().collect();
        found.sort_by_key(|(position, _)| *position);
        Ok(found.into_iter().map(|(_, measured)| measured).collect())
    }
}

impl Measured {
    /// The operation alone, on operands of its types.
    fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::new();
        let mut inputs = Vec::new();
        let mut integers = self.integers.iter();
        for (number, (ty, storage)) in self.operands.iter().enumerate() {
            graph.set_precision(Precision {
                parameters: *storage,
                activations: self.activations,
            });
            if ty.dtype != DType::F32 {
                let integers = integers.next().ok_or_else(|| {
                    Error::shape(self.op.name(), format!("no sample of the integers {ty}"))
                })?;
                inputs.push(graph.constant(integers.clone())?);
                continue;
            }
            let init = Init::Uniform { bound: 1.0 };
            inputs.push(graph.parameter(&format!("operand {number}"), ty.dims(), init, false)?);
        }
        for output in graph.append(Arc::clone(&self.op), &inputs)? {
            graph.output(output)?;
        }
        Ok(graph)
    }

    fn tune(&self, device: &Device, capabilities: &Capabilities) -> Result<TunedOperation> {
        let graph = self.graph()?;
        let store = ParameterStore::new(device);
        store.initialize(&graph, 1)?;
        let mut sessions = Vec::new();
        for &kernel in &self.choice.kernels {
            let mut capabilities = capabilities.clone();
            capabilities
                .kernels
                .insert(self.choice.key.as_str(), kernel);
            let compiled =
                graph.compile_for(&store, SessionOptions::default(), Some(&capabilities));
            sessions.push(match compiled.and_then(Repeated::new) {
                Ok(session) => Some(session),
                // What a driver does not take is no candidate.
                Err(Error::Gpu { .. } | Error::Limit { .. }) => None,
                Err(error) => return Err(error),
            });
        }
        let begun = Instant::now();
        let enough = |sessions: &[Option<Repeated>]| {
            let mut sampled = sessions.iter().flatten();
            sampled.all(|session| session.samples.len() >= SAMPLES) && begun.elapsed() >= SPAN
        };
        while !enough(&sessions) {
            for session in sessions.iter_mut().flatten() {
                session.sample()?;
            }
        }
        let names = self.choice.kernels.iter().copied();
        let seconds = sessions
            .iter()
            .map(|session| session.as_ref().map(Repeated::median));
        let kernels: Vec<(&'static str, Option<f64>)> = names.zip(seconds).collect();
        Ok(TunedOperation {
            key: self.choice.key.clone(),
            chosen: fastest(&kernels),
            kernels,
        })
    }
}

/// The first kernel, unless another is faster by enough, or it was refused.
fn fastest(kernels: &[(&'static str, Option<f64>)]) -> &'static str {
    let (own, own_seconds) = kernels[0];
    let measured = kernels
        .iter()
        .filter_map(|&(kernel, seconds)| Some((kernel, seconds?)));
    let best = measured.min_by(|(_, one), (_, other)| one.total_cmp(other));
    match (best, own_seconds) {
        (Some((kernel, seconds)), Some(own_seconds)) if seconds < WORTHWHILE * own_seconds => {
            kernel
        }
        (Some((kernel, _)), None) => kernel,
        _ => own,
    }
}

/// A session that is run so many times a sample.
struct Repeated {
    session: Session,
    times: usize,
    samples: Vec<f64>,
}

impl Repeated {
    fn new(session: Session) -> Result<Self> {
        let mut repeated = Self {
            session,
            times: 1,
            samples: Vec::new(),
        };
        // Drivers compile much of a kernel when it is first used.
        repeated.sample()?;
        repeated.sample()?;
        let once = repeated.samples[1].max(1e-7);
        repeated.times = ((SAMPLE_SECONDS / once) as usize).clamp(1, 512);
        repeated.samples.clear();
        Ok(repeated)
    }

    fn sample(&mut self) -> Result<()> {
        let start = Instant::now();
        self.session.run_repeatedly(self.times)?;
        self.session.device().wait()?;
        self.samples
            .push(start.elapsed().as_secs_f64() / self.times as f64);
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut samples = self.samples.clone();
        samples.sort_by(f64::total_cmp);
        samples[samples.len() / 2]
    }
}

#[cfg(test)]
mod tests {
    use super::fastest;

    #[test]
    fn the_own_rule_stands_unless_another_is_faster_by_enough() {
        assert_eq!(fastest(&[("own", Some(1.0)), ("other", Some(0.98))]), "own");
        assert_eq!(
            fastest(&[("own", Some(1.0)), ("other", Some(0.9))]),
            "other"
        );
        assert_eq!(fastest(&[("own", None), ("other", Some(9.0))]), "other");
        assert_eq!(fastest(&[("own", Some(1.0)), ("other", None)]), "own");
        assert_eq!(fastest(&[("own", None), ("other", None)]), "own");
    }
}
