//! Kernels with one fault each, for the proof that the checks find it: `tests/faults/*.wgsl`. A file's head says how it is launched, as
//! `// launch: ENTRY, read 1, write 2, params 4`.

use std::fs;
use std::path::Path;

use rankmix::device::{Launch, Shader, Slot};

use super::Kernel;

const FOLDER: &str = "tests/faults";

/// The kernels of all files there.
pub fn all() -> Vec<Kernel> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(FOLDER);
    let entries = fs::read_dir(folder).expect("the folder of faults is there");
    let mut kernels = Vec::new();
    for path in entries.map(|entry| entry.expect("a readable folder").path()) {
        if path
            .extension()
            .is_some_and(|extension| extension == "wgsl")
        {
            let source = fs::read_to_string(&path).expect("readable WGSL");
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            kernels.push(kernel(&stem, source));
        }
    }
    kernels
}

/// The kernel of such a file.
pub fn kernel(stem: &str, source: String) -> Kernel {
    // The data of a launch lives as long as the program; so do these few.
    let (name, source): (&str, &str) = (stem.to_owned().leak(), source.leak());
    let head = source
        .lines()
        .find_map(|line| line.strip_prefix("// launch: "));
    let head =
        head.unwrap_or_else(|| panic!("{FOLDER}/{stem}.wgsl does not say how it is launched"));
    let mut words = head.split(", ");
    let mut launch = Launch::new(Shader { name, source }, words.next().unwrap_or_default());
    for word in words {
        let (what, number) = word.split_once(' ').unwrap_or((word, ""));
        let number: u32 = number
            .parse()
            .unwrap_or_else(|_| panic!("{FOLDER}/{stem}.wgsl: `{word}`"));
        launch = match what {
            "read" => launch.read(number, Slot::Input(0)),
            "write" => launch.write(number, Slot::Output(0)),
            "params" => (0..number).fold(launch, Launch::param),
            _ => panic!("{FOLDER}/{stem}.wgsl: `{word}`"),
        };
    }
    Kernel {
        name: format!("{stem}::{}", launch.entry),
        path: format!("{FOLDER}/{stem}.wgsl"),
        launch,
    }
}
