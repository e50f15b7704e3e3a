//! Every kernel that ships, as data, without a device: what operations launch in all cases, over a sweep of shapes, and in training, each
//! with floats stored in 32 bits, in packed halves and in native halves.

pub mod faults;
pub mod limits;
pub mod lines;
pub mod sweep;
pub mod translate;
pub mod write;

use std::collections::{BTreeMap, BTreeSet};

use rankmix::device::{Access, AdapterClass, Capabilities, Launch};
use rankmix::{Graph, Precision};

use crate::{cases, everything};

/// A kernel as it is launched: a shader, an entry point, and values for its constants.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub name: String,
    /// The file that its entry point stands in, from the root of the repository.
    pub path: String,
    pub launch: Launch,
}

impl Kernel {
    fn new(launch: Launch) -> Self {
        let shader = launch.shader.name.split(" (").next().unwrap_or_default();
        let mut kernel = Self {
            name: String::new(),
            path: format!("shaders/{shader}.wgsl"),
            launch,
        };
        let form = match kernel.form() {
            "f32" => String::new(),
            form => format!(" {form}"),
        };
        let (shader, entry) = (kernel.launch.shader.name, kernel.launch.entry);
        let name = format!("{shader}{form}::{entry} {}", kernel.constants());
        kernel.name = name.trim().to_owned();
        kernel
    }

    /// How floats are stored.
    pub fn form(&self) -> &'static str {
        if self.is_native_f16() {
            "native"
        } else if self.launch.shader.name.contains("(f16") {
            "packed"
        } else {
            "f32"
        }
    }

    /// Only the adapters that have `shader-f16` are given such a kernel.
    pub fn is_native_f16(&self) -> bool {
        self.launch.shader.source.contains("enable f16;")
    }

    /// The kernel with the constants that its file gives, if it binds everything that it reads then. `in_32_bits` are the entry points that are
    /// launched so; the others, which write nothing but halves, have it in packed halves, which every adapter reads.
    fn at_default_tile(&self, in_32_bits: &BTreeSet<(String, &str)>) -> Option<Self> {
        let has_32_bits = in_32_bits.contains(&(self.path.clone(), self.launch.entry));
        if self.form() != if has_32_bits { "f32" } else { "packed" } {
            return None;
        }
        let mut launch = self.launch.clone();
        launch.constants.clear();
        let kernel = Self::new(launch);
        let parsed = translate::Parsed::new(&kernel).ok()?;
        limits::bindings_agree(&parsed, &kernel).ok()?;
        Some(kernel)
    }

    pub fn constants(&self) -> String {
        let constants = self.launch.constants.iter();
        let constants: Vec<String> = constants
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        constants.join(" ")
    }

    /// The constants that set the size of workgroups and their tiles.
    pub fn tile(&self) -> String {
        let sizes = ["LANES", "WORKGROUP", "SCAN_WORKGROUP", "CELLS"];
        let constants = self.launch.constants.iter();
        let sizes: Vec<String> = constants
            .filter(|(name, _)| sizes.iter().any(|size| name.starts_with(size)))
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        sizes.join(" ")
    }
}

/// What adapters may tell a kernel apart by.
fn devices() -> Vec<(Precision, Capabilities)> {
    let mut devices = Vec::new();
    for (class, subgroup_size) in [
        (AdapterClass::Discrete, None),
        (AdapterClass::Software, None),
        (AdapterClass::Software, Some(8)),
    ] {
        for (precision, f16) in [
            (Precision::F32, false),
            (Precision::F16, false),
            (Precision::F16, true),
        ] {
            let capabilities = Capabilities {
                class,
                f16,
                subgroups: subgroup_size.is_some(),
                subgroup_size,
                ..Capabilities::webgpu_defaults()
            };
            devices.push((precision, capabilities));
        }
    }
    devices
}

/// What tells kernels apart: the name, the bindings by number with whether they are written, how many parameters there are.
type Key = (String, Vec<(u32, bool)>, usize);

/// Kernels, each once.
#[derive(Default)]
pub struct Collection {
    found: BTreeMap<Key, Kernel>,
}

impl Collection {
    fn insert(&mut self, kernel: Kernel) {
        let bindings = kernel.launch.bindings.iter();
        let bindings = bindings
            .map(|one| (one.number, one.access == Access::ReadWrite))
            .collect();
        let key = (kernel.name.clone(), bindings, kernel.launch.params.len());
        self.found.entry(key).or_insert(kernel);
    }

    /// Adds the kernels of a graph.
    fn add(&mut self, graph: &Graph, capabilities: &Capabilities, checked: bool) {
        let launches = graph
            .launches(capabilities, checked)
            .expect("the graphs fit every WebGPU device");
        for launch in launches {
            self.insert(Kernel::new(launch));
        }
    }

    fn kernels(self) -> Vec<Kernel> {
        self.found.into_values().collect()
    }
}

/// The capabilities with each kernel named in turn, wherever the graph has it among several; none where it has no choice.
pub fn each_choice(
    graph: &Graph,
    capabilities: &Capabilities,
) -> BTreeMap<&'static str, Capabilities> {
    let choices = graph
        .kernel_choices(capabilities)
        .expect("the graphs fit every WebGPU device");
    let mut of_kernel: BTreeMap<&'static str, Capabilities> = BTreeMap::new();
    for choice in choices {
        for kernel in choice.kernels {
            let named = of_kernel
                .entry(kernel)
                .or_insert_with(|| capabilities.clone());
            named.kernels.insert(choice.key.as_str(), kernel);
        }
    }
    of_kernel
}

/// The kernels that the cases launch, and those that they could launch in place of them, which are compared with the reference on every device.
pub fn of_cases() -> Vec<Kernel> {
    let mut collection = Collection::default();
    let cases = cases::all();
    for (precision, capabilities) in devices() {
        for case in &cases {
            let graph = case.graph(precision).expect("the cases are sound");
            collection.add(&graph, &capabilities, true);
            if capabilities.class == AdapterClass::Discrete {
                for chosen in each_choice(&graph, &capabilities).values() {
                    collection.add(&graph, chosen, true);
                }
            }
        }
        for graph in everything::graphs(precision) {
            collection.add(&graph, &capabilities, true);
        }
    }
    collection.kernels()
}

/// The kernels that operations choose over the sweep of shapes.
pub fn of_sweep() -> Vec<Kernel> {
    let mut collection = Collection::default();
    for (precision, capabilities) in devices() {
        for graph in sweep::graphs(precision) {
            collection.add(&graph, &capabilities, false);
            if capabilities.class == AdapterClass::Discrete && precision == Precision::F32 {
                for chosen in each_choice(&graph, &capabilities).values() {
                    collection.add(&graph, chosen, false);
                }
            }
        }
    }
    collection.kernels()
}

/// Every kernel, each once: those of the cases and of the sweep, and each entry point with the constants that its file gives, which is how
/// kernels are compared with each other.
pub fn all() -> Vec<Kernel> {
    let mut collection = Collection::default();
    let launched: Vec<Kernel> = of_cases().into_iter().chain(of_sweep()).collect();
    let in_32_bits = launched
        .iter()
        .filter(|kernel| kernel.form() == "f32")
        .map(|kernel| (kernel.path.clone(), kernel.launch.entry))
        .collect();
    let defaults: Vec<Kernel> = launched
        .iter()
        .filter_map(|kernel| kernel.at_default_tile(&in_32_bits))
        .collect();
    for kernel in launched.into_iter().chain(defaults) {
        collection.insert(kernel);
    }
    collection.kernels()
}
