//! Every kernel, without a GPU: parsed and validated by naga, its bindings and parameters compared with the launch, its limits with those
//! that WebGPU and Metal guarantee, and translated to what every backend compiles. `scripts/check_shaders.sh` gives the same texts to
//! the backends' own compilers.

use std::collections::BTreeSet;
use std::path::Path;

use libtest_mimic::{Failed, Trial};

use crate::kernels::lines::Origins;
use crate::kernels::translate::{Finding, Parsed, texts};
use crate::kernels::{self, Kernel, faults, limits, lines};

fn check(kernel: &Kernel) -> Result<(), Finding> {
    let parsed = Parsed::new(kernel)?;
    limits::check(&parsed, kernel)?;
    texts(&parsed, kernel)?;
    Ok(())
}

/// A kernel that no case launches is compared with no reference.
fn cases_reach_every_entry_point() -> Result<(), Failed> {
    let cases = kernels::of_cases();
    let launched: BTreeSet<(&str, &str)> = cases
        .iter()
        .map(|kernel| (kernel.path.as_str(), kernel.launch.entry))
        .collect();
    let entry_points = lines::entry_points();
    let missed: Vec<String> = entry_points
        .iter()
        .filter(|(path, entry)| !launched.contains(&(path.as_str(), entry.as_str())))
        .map(|(path, entry)| format!("{path} `{entry}`"))
        .collect();
    if missed.is_empty() {
        Ok(())
    } else {
        Err(format!("no case launches {}", missed.join(", ")).into())
    }
}

/// In kernels in 32 bits, every line of a text is the very line that it is said to come from.
fn lines_are_where_they_are_said_to_be() -> Result<(), Failed> {
    let origins = Origins::read();
    for kernel in kernels::all()
        .iter()
        .filter(|kernel| kernel.form() == "f32")
    {
        let text = kernel.launch.shader.source.lines();
        for (line, origin) in text.zip(origins.lines(kernel)) {
            let (path, number) = origin.split_once(':').ok_or("there is no line number")?;
            let file = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))?;
            if file.lines().nth(number.parse::<usize>()? - 1) != Some(line) {
                return Err(format!("{}: `{line}` is not {origin}", kernel.name).into());
            }
        }
    }
    Ok(())
}

/// Tiles of Givens chains of so high a rank that llvmpipe cuts their loops short, which it does after 65,535 turns.
const TILES_THAT_NO_CASE_RUNS: [&str; 6] = [
    "shaders/rotate_givens.wgsl `backward` WORKGROUP=1",
    "shaders/rotate_givens.wgsl `backward` WORKGROUP=2",
    "shaders/rotate_givens.wgsl `backward` WORKGROUP=4",
    "shaders/rotate_givens.wgsl `forward` WORKGROUP=2",
    "shaders/rotate_givens.wgsl `forward` WORKGROUP=4",
    "shaders/rotate_givens.wgsl `forward` WORKGROUP=8",
];

/// A tile that an operation chooses for some shape is run by a case.
fn cases_reach_every_tile() -> Result<(), Failed> {
    let tiles = |kernels: &[Kernel]| -> BTreeSet<String> {
        let tiles = kernels.iter().map(|kernel| {
            let (path, entry) = (&kernel.path, kernel.launch.entry);
            format!("{path} `{entry}` {}", kernel.tile())
        });
        tiles.collect()
    };
    let (cases, sweep) = (tiles(&kernels::of_cases()), tiles(&kernels::of_sweep()));
    let missed: Vec<&str> = sweep.difference(&cases).map(String::as_str).collect();
    if missed == TILES_THAT_NO_CASE_RUNS {
        Ok(())
    } else {
        Err(format!("no case runs\n{}", missed.join("\n")).into())
    }
}

/// A kernel that needs more than a limit is refused, by WebGPU's rules and by Metal's.
fn limits_refuse_what_is_over() -> Result<(), Failed> {
    let storage = |count: u32| -> String {
        (1..=count)
            .map(|n| {
                format!("@group(0) @binding({n}) var<storage, read_write> b{n}: array<f32>;\n")
            })
            .collect()
    };
    let uses = |count: u32| -> String { (1..=count).map(|n| format!("b{n}[0] = 1.0; ")).collect() };
    let threads = format!(
        "{}@compute @workgroup_size(32, 33) fn forward() {{ {} }}",
        storage(1),
        uses(1)
    );
    let memory = format!(
        "{}var<workgroup> m: array<f32, 8193>;\n@compute @workgroup_size(1) fn forward() {{ m[0] = 1.0; {} }}",
        storage(1),
        uses(1)
    );
    // With the parameters and the buffer of lengths, the 30th storage buffer is Metal's 32nd.
    let buffers = format!(
        "{}@compute @workgroup_size(1) fn forward() {{ {} }}",
        storage(30),
        uses(30)
    );
    for (source, count, webgpu, metal) in [
        (
            threads,
            1,
            "1056 invocations, ",
            "1056 threads in a threadgroup, ",
        ),
        (
            memory,
            1,
            "32784 bytes of workgroup memory, ",
            "32784 bytes of threadgroup memory, ",
        ),
        (buffers, 30, "30 storage buffers, ", "32 buffers, "),
    ] {
        let kernel = faults::kernel(
            "over",
            format!(
                "// launch: forward{}\n{source}",
                (1..=count)
                    .map(|n| format!(", write {n}"))
                    .collect::<String>()
            ),
        );
        let parsed = Parsed::new(&kernel).map_err(|finding| finding.message)?;
        for (found, expected) in [
            (limits::webgpu_limits_are_kept(&parsed, &kernel), webgpu),
            (limits::metal_limits_are_kept(&parsed, &kernel), metal),
        ] {
            match found {
                Err(finding) if finding.message.starts_with(expected) => {}
                found => return Err(format!("`{expected}...` was expected, not {found:?}").into()),
            }
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test(
            "shaders::cases_reach_every_entry_point",
            cases_reach_every_entry_point,
        ),
        Trial::test("shaders::cases_reach_every_tile", cases_reach_every_tile),
        Trial::test(
            "shaders::limits_refuse_what_is_over",
            limits_refuse_what_is_over,
        ),
        Trial::test(
            "shaders::lines_are_where_they_are_said_to_be",
            lines_are_where_they_are_said_to_be,
        ),
    ];
    for kernel in kernels::all() {
        let name = format!("shaders::{}", kernel.name);
        trials.push(Trial::test(name, move || {
            check(&kernel).map_err(|finding| {
                let text = kernel
                    .launch
                    .shader
                    .source
                    .lines()
                    .nth(finding.line - 1)
                    .unwrap_or_default();
                Failed::from(format!("{}\n{text}", finding.message))
            })
        }));
    }
    trials
}
