//! What a kernel needs against what its launch gives, and against what WebGPU and Metal guarantee everywhere.

use naga::{AddressSpace, StorageAccess};
use rankmix::device::{Access, Capabilities};

use super::Kernel;
use super::translate::{Finding, Parsed, line_of, metal_buffers};

/// Limits of every Apple GPU since the A11 and of every Mac with Apple silicon.
///
/// Source: Apple, Metal Feature Set Tables, "GPU implementation limits by family", columns Apple4 and later.
mod metal {
    /// "Maximum total threadgroup memory allocation": 32 KB.
    pub const THREADGROUP_BYTES: u32 = 32 << 10;
    /// "Threadgroup memory length alignment": 16 B.
    pub const THREADGROUP_ALIGNMENT: u32 = 16;
    /// "Maximum threads per threadgroup": 1024. The compiler may allow a pipeline fewer, for its registers; on the M1 Mesa's
    /// compiler says so (`scripts/kernel_cost.sh --all`).
    pub const THREADS: u32 = 1024;
    /// "Maximum number of entries in the buffer argument table, per graphics or kernel function": 31. wgpu binds the uniform and
    /// storage buffers, and after them one with the lengths of the storage buffers (wgpu-hal, metal/device.rs, `create_pipeline_layout`).
    pub const BUFFERS: usize = 31;
}

/// Limits of WebGPU that [`Capabilities`] does not name: <https://www.w3.org/TR/webgpu/#limits>, `maxComputeWorkgroupSizeZ`.
const WEBGPU_DEPTH: u32 = 64;

fn declaration(kernel: &Kernel, name: &str) -> usize {
    line_of(kernel.launch.shader.source, &format!("> {name}:"))
}

/// The launch binds what the entry point uses, and gives it as many parameters as its struct has.
pub fn bindings_agree(parsed: &Parsed, kernel: &Kernel) -> Result<(), Finding> {
    let module = &parsed.module;
    let launch = &kernel.launch;
    let mut seen = Vec::new();
    for (_, global) in parsed.used(|_| true) {
        let Some(binding) = &global.binding else {
            continue;
        };
        let name = global.name.clone().unwrap_or_default();
        let wrong = |message: String| Err(Finding::new(declaration(kernel, &name), message));
        if binding.group != 0 {
            return wrong(format!(
                "`{name}` is in group {}, launches bind group 0",
                binding.group
            ));
        }
        match global.space {
            AddressSpace::Uniform => {
                let size = module.types[global.ty].inner.size(module.to_ctx()) as usize;
                let given = launch.params.len() * 4;
                if size != given && size != given.next_multiple_of(16) {
                    return wrong(format!(
                        "the parameters have {size} bytes, the launch gives {given}"
                    ));
                }
            }
            AddressSpace::Storage { access } => {
                let bound = launch
                    .bindings
                    .iter()
                    .find(|bound| bound.number == binding.binding);
                let Some(bound) = bound else {
                    return wrong(format!(
                        "`{name}` is used by `{}` but not bound",
                        launch.entry
                    ));
                };
                let writes = access.contains(StorageAccess::STORE);
                if writes != (bound.access == Access::ReadWrite) {
                    return wrong(format!(
                        "`{name}` is declared {access:?} and bound {:?}",
                        bound.access
                    ));
                }
                seen.push(binding.binding);
            }
            _ => {}
        }
    }
    match launch
        .bindings
        .iter()
        .find(|bound| !seen.contains(&bound.number))
    {
        Some(bound) => {
            let message = format!(
                "binding {} is bound but not used by `{}`",
                bound.number, launch.entry
            );
            Err(Finding::new(parsed.entry_line, message))
        }
        None => Ok(()),
    }
}

/// Bytes of the kernel's workgroup memory, each variable at a multiple of so many.
fn workgroup_bytes(parsed: &Parsed, alignment: u32) -> u32 {
    let module = &parsed.module;
    let variables = parsed.used(|space| space == AddressSpace::WorkGroup);
    let sizes = variables
        .iter()
        .map(|(_, global)| module.types[global.ty].inner.size(module.to_ctx()));
    sizes.map(|size| size.next_multiple_of(alignment)).sum()
}

/// Where the kernel's workgroup memory is declared.
fn workgroup_line(parsed: &Parsed, kernel: &Kernel) -> usize {
    let variables = parsed.used(|space| space == AddressSpace::WorkGroup);
    let name = variables
        .first()
        .and_then(|(_, global)| global.name.as_deref());
    name.map_or(parsed.entry_line, |name| declaration(kernel, name))
}

/// What WebGPU guarantees everywhere is enough.
pub fn webgpu_limits_are_kept(parsed: &Parsed, kernel: &Kernel) -> Result<(), Finding> {
    let limits = Capabilities::webgpu_defaults();
    let [x, y, z] = parsed.entry_point().workgroup_size;
    let storage = kernel.launch.bindings.len() as u32;
    let memory_line = workgroup_line(parsed, kernel);
    // Tint counts every variable at a multiple of 16 bytes.
    for (what, line, needed, limit) in [
        (
            "invocations",
            parsed.entry_line,
            x * y * z,
            limits.max_invocations_per_workgroup,
        ),
        (
            "bytes of workgroup memory",
            memory_line,
            workgroup_bytes(parsed, 16),
            limits.max_workgroup_bytes,
        ),
        (
            "storage buffers",
            parsed.entry_line,
            storage,
            limits.max_storage_buffers,
        ),
        ("invocations along z", parsed.entry_line, z, WEBGPU_DEPTH),
    ] {
        if needed > limit {
            return Err(Finding::new(
                line,
                format!("{needed} {what}, WebGPU guarantees {limit}"),
            ));
        }
    }
    Ok(())
}

/// What every Apple GPU can do is enough.
pub fn metal_limits_are_kept(parsed: &Parsed, kernel: &Kernel) -> Result<(), Finding> {
    let threads: u32 = parsed.entry_point().workgroup_size.iter().product();
    let bytes = workgroup_bytes(parsed, metal::THREADGROUP_ALIGNMENT);
    let memory_line = workgroup_line(parsed, kernel);
    for (what, line, needed, limit) in [
        (
            "threads in a threadgroup",
            parsed.entry_line,
            threads as usize,
            metal::THREADS as usize,
        ),
        (
            "bytes of threadgroup memory",
            memory_line,
            bytes as usize,
            metal::THREADGROUP_BYTES as usize,
        ),
        (
            "buffers",
            parsed.entry_line,
            metal_buffers(kernel),
            metal::BUFFERS,
        ),
    ] {
        if needed > limit {
            return Err(Finding::new(
                line,
                format!("{needed} {what}, Metal has {limit}"),
            ));
        }
    }
    Ok(())
}

/// All of the above.
pub fn check(parsed: &Parsed, kernel: &Kernel) -> Result<(), Finding> {
    bindings_agree(parsed, kernel)?;
    webgpu_limits_are_kept(parsed, kernel)?;
    metal_limits_are_kept(parsed, kernel)
}
