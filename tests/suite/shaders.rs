//! Every kernel that the cases launch, without a GPU: parsed and validated by naga, its bindings and parameters compared with the
//! launch, its limits with those that WebGPU guarantees, and translated to what every backend compiles.

use std::collections::BTreeMap;
use std::sync::Arc;

use libtest_mimic::{Failed, Trial};
use naga::back::pipeline_constants::process_overrides;
use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities as Features, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess};
use rankmix::Precision;
use rankmix::device::{Access, Capabilities, Launch};

use crate::cases;

/// The launches of all cases, one of each kind, by a name.
fn launches() -> BTreeMap<String, Arc<Launch>> {
    let defaults = Capabilities::webgpu_defaults();
    let with_f16 = Capabilities {
        f16: true,
        ..defaults
    };
    let forms = [
        (Precision::F32, "", &defaults),
        (Precision::F16, " packed", &defaults),
        (Precision::F16, " native", &with_f16),
    ];
    let mut found = BTreeMap::new();
    let cases = cases::all();
    for (case, (precision, form, capabilities)) in
        cases.iter().flat_map(|case| forms.map(|form| (case, form)))
    {
        let graph = case.graph(precision).expect("the cases are sound");
        for launch in graph
            .launches(capabilities)
            .expect("the cases fit every WebGPU device")
        {
            let form = if launch.shader.name.contains("f16") {
                form
            } else {
                ""
            };
            let constants: Vec<String> = launch
                .constants
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            let name = format!(
                "shaders::{}{form}::{} {}",
                launch.shader.name,
                launch.entry,
                constants.join(" ")
            );
            found
                .entry(name.trim().to_owned())
                .or_insert_with(|| Arc::new(launch));
        }
    }
    found
}

/// Only the adapters that have `shader-f16` are given such a kernel.
fn is_native_f16(launch: &Launch) -> bool {
    launch.shader.source.starts_with("enable f16;")
}

struct Kernel {
    module: Module,
    info: ModuleInfo,
    entry: (ShaderStage, String),
}

/// The kernel with the launch's constants filled in.
fn kernel(launch: &Launch) -> Result<Kernel, Failed> {
    let source = launch.shader.source;
    let parsed =
        naga::front::wgsl::parse_str(source).map_err(|error| error.emit_to_string(source))?;
    let features = if is_native_f16(launch) {
        Features::SHADER_FLOAT16
    } else {
        Features::SHADER_FLOAT16_IN_FLOAT32
    };
    let mut validator = Validator::new(ValidationFlags::all(), features);
    let info = validator
        .validate(&parsed)
        .map_err(|error| error.emit_to_string(source))?;
    for (name, _) in &launch.constants {
        if !parsed
            .overrides
            .iter()
            .any(|(_, constant)| constant.name.as_deref() == Some(*name))
        {
            return Err(format!("there is no override constant `{name}`").into());
        }
    }
    let constants = launch
        .constants
        .iter()
        .map(|&(name, value)| (name.to_owned(), value))
        .collect();
    let entry = (ShaderStage::Compute, launch.entry.to_owned());
    let (module, info) = process_overrides(&parsed, &info, Some((entry.0, &entry.1)), &constants)
        .map_err(|error| error.to_string())?;
    Ok(Kernel {
        module: module.into_owned(),
        info: info.into_owned(),
        entry,
    })
}

/// The launch binds what the entry point uses, and gives it as many parameters as its struct has.
fn bindings_agree(kernel: &Kernel, launch: &Launch) -> Result<(), Failed> {
    let module = &kernel.module;
    let position = module
        .entry_points
        .iter()
        .position(|entry| entry.name == launch.entry);
    let position = position.ok_or("there is no such entry point")?;
    let used = kernel.info.get_entry_point(position);
    let mut seen = Vec::new();
    for (handle, global) in module.global_variables.iter() {
        if used[handle].is_empty() {
            continue;
        }
        let Some(binding) = &global.binding else {
            continue;
        };
        let name = global.name.clone().unwrap_or_default();
        match global.space {
            AddressSpace::Uniform => {
                let size = module.types[global.ty].inner.size(module.to_ctx()) as usize;
                let given = launch.params.len() * 4;
                if size != given && size != given.next_multiple_of(16) {
                    return Err(format!(
                        "the parameters have {size} bytes, the launch gives {given}"
                    )
                    .into());
                }
            }
            AddressSpace::Storage { access } => {
                let bound = launch
                    .bindings
                    .iter()
                    .find(|bound| bound.number == binding.binding);
                let bound = bound.ok_or_else(|| format!("`{name}` is used but not bound"))?;
                let writes = access.contains(StorageAccess::STORE);
                if writes != (bound.access == Access::ReadWrite) {
                    return Err(format!(
                        "`{name}` is declared {access:?} and bound {:?}",
                        bound.access
                    )
                    .into());
                }
                seen.push(binding.binding);
            }
            _ => {}
        }
    }
    if let Some(bound) = launch
        .bindings
        .iter()
        .find(|bound| !seen.contains(&bound.number))
    {
        return Err(format!("binding {} is bound but not used", bound.number).into());
    }
    Ok(())
}

/// What WebGPU guarantees everywhere is enough.
fn limits_are_kept(kernel: &Kernel, launch: &Launch) -> Result<(), Failed> {
    let limits = Capabilities::webgpu_defaults();
    let module = &kernel.module;
    let position = module
        .entry_points
        .iter()
        .position(|entry| entry.name == launch.entry);
    let position = position.ok_or("there is no such entry point")?;
    let entry = &module.entry_points[position];
    let invocations: u32 = entry.workgroup_size.iter().product();
    let used = kernel.info.get_entry_point(position);
    let memory: u32 = module
        .global_variables
        .iter()
        .filter(|(handle, global)| {
            global.space == AddressSpace::WorkGroup && !used[*handle].is_empty()
        })
        .map(|(_, global)| {
            module.types[global.ty]
                .inner
                .size(module.to_ctx())
                .next_multiple_of(16)
        })
        .sum();
    let found = [
        (
            "invocations",
            invocations,
            limits.max_invocations_per_workgroup,
        ),
        (
            "bytes of workgroup memory",
            memory,
            limits.max_workgroup_bytes,
        ),
        (
            "storage buffers",
            launch.bindings.len() as u32,
            limits.max_storage_buffers,
        ),
        ("invocations along z", entry.workgroup_size[2], 64),
    ];
    for (what, needed, limit) in found {
        if needed > limit {
            return Err(format!("{needed} {what}, WebGPU guarantees {limit}").into());
        }
    }
    Ok(())
}

/// SPIR-V with and without checks, MSL, HLSL and GLSL ES come out; GLSL has no f16.
fn translations_exist(kernel: &Kernel, native_f16: bool) -> Result<(), Failed> {
    let Kernel {
        module,
        info,
        entry,
    } = kernel;
    for (index, checked) in [
        (BoundsCheckPolicy::Restrict, true),
        (BoundsCheckPolicy::Unchecked, false),
    ] {
        let bounds_check_policies = BoundsCheckPolicies {
            index,
            buffer: index,
            ..BoundsCheckPolicies::default()
        };
        let options = spv::Options {
            bounds_check_policies,
            force_loop_bounding: checked,
            fake_missing_bindings: true,
            ..spv::Options::default()
        };
        let pipeline = spv::PipelineOptions {
            shader_stage: entry.0,
            entry_point: entry.1.clone(),
        };
        spv::write_vec(module, info, &options, Some(&pipeline))
            .map_err(|error| format!("SPIR-V: {error}"))?;
    }
    let options = msl::Options {
        lang_version: (2, 4),
        fake_missing_bindings: true,
        ..msl::Options::default()
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some(entry.clone()),
        ..msl::PipelineOptions::default()
    };
    msl::write_string(module, info, &options, &pipeline)
        .map_err(|error| format!("MSL: {error}"))?;
    let mut text = String::new();
    let options = hlsl::Options {
        shader_model: if native_f16 {
            hlsl::ShaderModel::V6_2
        } else {
            hlsl::ShaderModel::V5_1
        },
        fake_missing_bindings: true,
        ..hlsl::Options::default()
    };
    let pipeline = hlsl::PipelineOptions {
        entry_point: Some(entry.clone()),
    };
    hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(module, info, None)
        .map_err(|error| format!("HLSL: {error}"))?;
    if native_f16 {
        return Ok(());
    }
    let options = glsl::Options {
        version: glsl::Version::new_gles(310),
        ..glsl::Options::default()
    };
    let pipeline = glsl::PipelineOptions {
        shader_stage: entry.0,
        entry_point: entry.1.clone(),
        multiview: None,
    };
    let mut text = String::new();
    glsl::Writer::new(
        &mut text,
        module,
        info,
        &options,
        &pipeline,
        BoundsCheckPolicies::default(),
    )
    .and_then(|mut writer| writer.write())
    .map_err(|error| format!("GLSL ES: {error}"))?;
    Ok(())
}

fn check(launch: &Launch) -> Result<(), Failed> {
    let kernel = kernel(launch)?;
    bindings_agree(&kernel, launch)?;
    limits_are_kept(&kernel, launch)?;
    translations_exist(&kernel, is_native_f16(launch))
}

pub fn trials() -> Vec<Trial> {
    launches()
        .into_iter()
        .map(|(name, launch)| Trial::test(name, move || check(&launch)))
        .collect()
}
