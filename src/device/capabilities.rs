//! What an adapter can do, in plain numbers, so that operations can choose kernels without naming wgpu.

use crate::device::kernel_choices::KernelChoices;

/// The kind of processor behind an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdapterClass {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the host's memory.
    Integrated,
    /// A GPU seen through a hypervisor.
    Virtual,
    /// A driver that does not say what it is.
    Other,
    /// A driver that runs kernels on the CPU, such as lavapipe or SwiftShader.
    Software,
}

impl AdapterClass {
    /// A word for tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Other => "other",
            Self::Software => "software",
        }
    }
}

/// The limits and features of an open device that kernels depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// What kind of adapter it is.
    pub class: AdapterClass,
    /// Workgroups in one dimension of a grid.
    pub max_workgroups_per_dimension: u32,
    /// Invocations in a workgroup.
    pub max_invocations_per_workgroup: u32,
    /// Bytes of workgroup memory.
    pub max_workgroup_bytes: u32,
    /// Storage buffers an entry point can bind.
    pub max_storage_buffers: u32,
    /// Bytes of one storage binding.
    pub max_binding_bytes: u64,
    /// Bytes of one buffer.
    pub max_buffer_bytes: u64,
    /// Alignment in bytes of an offset into the uniform buffer.
    pub uniform_alignment: u32,
    /// Whether kernels may use `f16`.
    pub f16: bool,
    /// Whether kernels may use subgroup operations.
    pub subgroups: bool,
    /// The number of invocations in every subgroup, where there are subgroups and their size does not vary.
    pub subgroup_size: Option<u32>,
    /// Whether single launches can be timed on the device.
    pub timestamps: bool,
    /// The kernels that operations are to take where they have a choice.
    pub kernels: KernelChoices,
}

impl Capabilities {
    /// The limits that WebGPU guarantees everywhere: what kernels must fit into when no device is at hand.
    #[must_use]
    pub fn webgpu_defaults() -> Self {
        Self {
            class: AdapterClass::Other,
            max_workgroups_per_dimension: 65_535,
            max_invocations_per_workgroup: 256,
            max_workgroup_bytes: 16_384,
            max_storage_buffers: 8,
            max_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            uniform_alignment: 256,
            f16: false,
            subgroups: false,
            subgroup_size: None,
            timestamps: false,
            kernels: KernelChoices::default(),
        }
    }

    /// The same on an adapter of this class.
    #[cfg(test)]
    pub(crate) fn of_class(class: AdapterClass) -> Self {
        Self {
            class,
            ..Self::webgpu_defaults()
        }
    }
}
