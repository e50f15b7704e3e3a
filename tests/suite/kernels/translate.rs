//! A kernel as every backend of wgpu 30 hands it to its driver: parsed and validated by naga, its constants filled in, and written in the
//! backend's language with the options that wgpu gives naga, with and without runtime checks.

use naga::back::pipeline_constants::process_overrides;
use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities as Features, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, EntryPoint, GlobalVariable, Handle, Module, ResourceBinding, ShaderStage,
};
use rankmix::device::Access;

use super::Kernel;

/// What is wrong with a kernel, and in which line of its text.
#[derive(Clone, Debug)]
pub struct Finding {
    pub line: usize,
    pub message: String,
}

impl Finding {
    pub fn new(line: usize, message: impl Into<String>) -> Self {
        Self {
            line,
            message: message.into(),
        }
    }
}

/// A kernel as naga sees it, with the launch's constants filled in.
pub struct Parsed {
    pub module: Module,
    pub info: ModuleInfo,
    /// The line of the entry point's name.
    pub entry_line: usize,
    entry: usize,
}

/// The line in which something is declared: `fn NAME(`, `> NAME:` of a variable.
pub fn line_of(source: &str, needle: &str) -> usize {
    let found = source.lines().position(|line| line.contains(needle));
    found.map_or(1, |line| line + 1)
}

impl Parsed {
    pub fn new(kernel: &Kernel) -> Result<Self, Finding> {
        let launch = &kernel.launch;
        let source = launch.shader.source;
        let line = |location: Option<naga::SourceLocation>| {
            location.map_or(1, |at| at.line_number as usize)
        };
        // naga takes built-ins of subgroups without the line that the standard, and Tint, insist on.
        let accepted = source.replace("enable subgroups;", "");
        let parsed = naga::front::wgsl::parse_str(&accepted)
            .map_err(|error| Finding::new(line(error.location(&accepted)), error.message()))?;
        let mut features = Features::SHADER_FLOAT16_IN_FLOAT32;
        features.set(Features::SHADER_FLOAT16, kernel.is_native_f16());
        features.set(Features::SUBGROUP, source.contains("enable subgroups;"));
        let mut validator = Validator::new(ValidationFlags::all(), features);
        let info = validator.validate(&parsed).map_err(|error| {
            let innermost =
                std::iter::successors(Some(error.as_inner() as &dyn std::error::Error), |error| {
                    error.source()
                });
            let message: Vec<String> = innermost.map(ToString::to_string).collect();
            Finding::new(line(error.location(&accepted)), message.join(": "))
        })?;
        let entry_line = line_of(source, &format!("fn {}(", launch.entry));
        let at_entry = |message: String| Finding::new(entry_line, message);
        for (name, _) in &launch.constants {
            let declared = |constant: &naga::Override| constant.name.as_deref() == Some(*name);
            if !parsed
                .overrides
                .iter()
                .any(|(_, constant)| declared(constant))
            {
                return Err(at_entry(format!("there is no override constant `{name}`")));
            }
        }
        if !parsed
            .entry_points
            .iter()
            .any(|entry| entry.name == launch.entry)
        {
            return Err(at_entry(format!(
                "there is no entry point `{}`",
                launch.entry
            )));
        }
        let constants = launch
            .constants
            .iter()
            .map(|&(name, value)| (name.to_owned(), value))
            .collect();
        let chosen = Some((ShaderStage::Compute, launch.entry));
        let (module, info) = process_overrides(&parsed, &info, chosen, &constants)
            .map_err(|error| at_entry(error.to_string()))?;
        let entry = module
            .entry_points
            .iter()
            .position(|entry| entry.name == launch.entry);
        Ok(Self {
            entry: entry.ok_or_else(|| at_entry("the entry point is lost".into()))?,
            module: module.into_owned(),
            info: info.into_owned(),
            entry_line,
        })
    }

    pub fn entry_point(&self) -> &EntryPoint {
        &self.module.entry_points[self.entry]
    }

    /// The variables of a kind that the entry point uses.
    pub fn used(
        &self,
        is_wanted: impl Fn(AddressSpace) -> bool,
    ) -> Vec<(Handle<GlobalVariable>, &GlobalVariable)> {
        let used = self.info.get_entry_point(self.entry);
        let globals = self.module.global_variables.iter();
        globals
            .filter(|&(handle, global)| is_wanted(global.space) && !used[handle].is_empty())
            .collect()
    }

    fn stage(&self) -> (ShaderStage, String) {
        (ShaderStage::Compute, self.entry_point().name.clone())
    }
}

/// One of the texts that a driver's compiler is given.
pub struct Text {
    pub language: Language,
    /// Whether it has the runtime checks of checked mode.
    pub checked: bool,
    pub content: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Language {
    SpirV,
    /// SPIR-V for a driver of Vulkan 1.1 without `VK_EXT_robustness2` and `VK_KHR_zero_initialize_workgroup_memory`.
    OldSpirV,
    Hlsl,
    Metal,
    GlslEs,
}

impl Language {
    pub fn extension(self) -> &'static str {
        match self {
            Self::SpirV => "spv",
            Self::OldSpirV => "old.spv",
            Self::Hlsl => "hlsl",
            Self::Metal => "metal",
            Self::GlslEs => "comp",
        }
    }
}

/// All texts of a kernel.
pub fn texts(parsed: &Parsed, kernel: &Kernel) -> Result<Vec<Text>, Finding> {
    let failed = |what: &str, error: String| {
        Finding::new(parsed.entry_line, format!("naga writes no {what}: {error}"))
    };
    let mut texts = Vec::new();
    for checked in [false, true] {
        let mut add = |language, content| {
            texts.push(Text {
                language,
                checked,
                content,
            });
        };
        let words =
            spirv(parsed, kernel, checked, (1, 6)).map_err(|error| failed("SPIR-V", error))?;
        add(Language::SpirV, words);
        if checked {
            let words =
                spirv(parsed, kernel, true, (1, 3)).map_err(|error| failed("SPIR-V 1.3", error))?;
            add(Language::OldSpirV, words);
        }
        let text = hlsl(parsed, kernel, checked).map_err(|error| failed("HLSL", error))?;
        add(Language::Hlsl, text.into_bytes());
        let text = metal(parsed, kernel, checked).map_err(|error| failed("MSL", error))?;
        add(Language::Metal, text.into_bytes());
    }
    // GLSL has no f16, and the same text with checks as without.
    if !kernel.is_native_f16() {
        let text = glsl_es(parsed, kernel).map_err(|error| failed("GLSL ES", error))?;
        texts.push(Text {
            language: Language::GlslEs,
            checked: false,
            content: text.into_bytes(),
        });
    }
    Ok(texts)
}

fn policy(checked: bool) -> BoundsCheckPolicy {
    if checked {
        BoundsCheckPolicy::Restrict
    } else {
        BoundsCheckPolicy::Unchecked
    }
}

/// The bindings of a kernel in the order of its bind group: the parameters, then the storage buffers, with whether they are written.
fn layout(kernel: &Kernel) -> impl Iterator<Item = (ResourceBinding, Option<bool>)> {
    let binding = |binding| ResourceBinding { group: 0, binding };
    let mut storage: Vec<(u32, bool)> = kernel
        .launch
        .bindings
        .iter()
        .map(|one| (one.number, one.access == Access::ReadWrite))
        .collect();
    storage.sort_unstable();
    let storage = storage
        .into_iter()
        .map(move |(number, written)| (binding(number), Some(written)));
    std::iter::once((binding(0), None)).chain(storage)
}

/// wgpu-hal, vulkan/adapter.rs and vulkan/device.rs. `robustBufferAccess2` is taken to be there from Vulkan 1.3 on.
fn spirv(
    parsed: &Parsed,
    kernel: &Kernel,
    checked: bool,
    version: (u8, u8),
) -> Result<Vec<u8>, String> {
    let modern = version == (1, 6);
    let workgroup_memory = match (checked, modern) {
        (false, _) => spv::ZeroInitializeWorkgroupMemoryMode::None,
        (true, true) => spv::ZeroInitializeWorkgroupMemoryMode::Native,
        (true, false) => spv::ZeroInitializeWorkgroupMemoryMode::Polyfill,
    };
    let options = spv::Options {
        lang_version: version,
        flags: spv::WriterFlags::empty(),
        bounds_check_policies: BoundsCheckPolicies {
            index: policy(checked),
            buffer: policy(checked && !modern),
            image_load: policy(checked && !modern),
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: workgroup_memory,
        force_loop_bounding: checked,
        emit_int_div_checks: checked,
        use_storage_input_output_16: kernel.is_native_f16(),
        fake_missing_bindings: true,
        ..spv::Options::default()
    };
    let (shader_stage, entry_point) = parsed.stage();
    let pipeline = spv::PipelineOptions {
        shader_stage,
        entry_point,
    };
    let words = spv::write_vec(&parsed.module, &parsed.info, &options, Some(&pipeline));
    let words = words.map_err(|error| error.to_string())?;
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

/// wgpu-hal, dx12/device.rs: the parameters are a root descriptor, whose indices are restricted; buffers are checked by the hardware. We ask
/// for no zeroed workgroup memory there. For kernels like ours the text is the same for every shader model.
fn hlsl(parsed: &Parsed, kernel: &Kernel, checked: bool) -> Result<String, String> {
    let (mut read, mut written) = (0, 0);
    let mut options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        fake_missing_bindings: false,
        zero_initialize_workgroup_memory: false,
        restrict_indexing: checked,
        force_loop_bounding: checked,
        ..hlsl::Options::default()
    };
    for (binding, is_written) in layout(kernel) {
        let register = match is_written {
            None => &mut 0,
            Some(false) => &mut read,
            Some(true) => &mut written,
        };
        let target = hlsl::BindTarget {
            register: *register,
            restrict_indexing: is_written.is_none(),
            ..hlsl::BindTarget::default()
        };
        *register += 1;
        options.binding_map.insert(binding, target);
    }
    let pipeline = hlsl::PipelineOptions {
        entry_point: Some(parsed.stage()),
    };
    let mut text = String::new();
    let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
    let reflection = writer
        .write(&parsed.module, &parsed.info, None)
        .map_err(|error| error.to_string())?;
    for name in reflection.entry_point_names {
        name.map_err(|error| error.to_string())?;
    }
    Ok(text)
}

/// How many of Metal's buffers a kernel takes: its own, and the one in which wgpu says how long they are.
pub fn metal_buffers(kernel: &Kernel) -> usize {
    layout(kernel).count() + 1
}

/// wgpu-hal, metal/device.rs: buffers are numbered in the order of the bind group, the buffer of their sizes comes last.
fn metal(parsed: &Parsed, kernel: &Kernel, checked: bool) -> Result<String, String> {
    let mut resources = msl::EntryPointResources::default();
    for (number, (binding, is_written)) in layout(kernel).enumerate() {
        let target = msl::BindTarget {
            buffer: Some(number as u8),
            mutable: is_written == Some(true),
            ..msl::BindTarget::default()
        };
        resources.resources.insert(binding, target);
    }
    resources.sizes_buffer = Some((metal_buffers(kernel) - 1) as u8);
    let stage = parsed.stage();
    let options = msl::Options {
        lang_version: (2, 4),
        per_entry_point_map: [(stage.1.clone(), resources)].into(),
        fake_missing_bindings: false,
        bounds_check_policies: BoundsCheckPolicies {
            index: policy(checked),
            buffer: policy(checked),
            image_load: policy(checked),
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: checked,
        force_loop_bounding: checked,
        emit_int_div_checks: checked,
        ..msl::Options::default()
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some(stage),
        vertex_pulling_transform: true,
        ..msl::PipelineOptions::default()
    };
    let (text, reflection) = msl::write_string(&parsed.module, &parsed.info, &options, &pipeline)
        .map_err(|error| error.to_string())?;
    for name in reflection.entry_point_names {
        name.map_err(|error| error.to_string())?;
    }
    Ok(text)
}

/// wgpu-hal, gles/device.rs: there are no bounds checks on GL, and we ask for no zeroed workgroup memory there.
fn glsl_es(parsed: &Parsed, kernel: &Kernel) -> Result<String, String> {
    let mut options = glsl::Options {
        version: glsl::Version::new_gles(310),
        writer_flags: glsl::WriterFlags::ADJUST_COORDINATE_SPACE
            | glsl::WriterFlags::FORCE_POINT_SIZE,
        zero_initialize_workgroup_memory: false,
        ..glsl::Options::default()
    };
    let mut storage = 0;
    for (binding, is_written) in layout(kernel) {
        let slot = if is_written.is_some() {
            &mut storage
        } else {
            &mut 0
        };
        options.binding_map.insert(binding, *slot);
        *slot += 1;
    }
    let (shader_stage, entry_point) = parsed.stage();
    let pipeline = glsl::PipelineOptions {
        shader_stage,
        entry_point,
        multiview: None,
    };
    let policies = BoundsCheckPolicies {
        index: BoundsCheckPolicy::Unchecked,
        buffer: BoundsCheckPolicy::Unchecked,
        image_load: BoundsCheckPolicy::Unchecked,
        binding_array: BoundsCheckPolicy::Unchecked,
    };
    let mut text = String::new();
    let written = glsl::Writer::new(
        &mut text,
        &parsed.module,
        &parsed.info,
        &options,
        &pipeline,
        policies,
    )
    .and_then(|mut writer| writer.write());
    written.map_err(|error| error.to_string())?;
    Ok(text)
}
