//! Files of tuned kernels.

use std::fs;

use rankmix::device::{AdapterSummary, Capabilities, KernelChoices, TunedKernels};
use rankmix::{Device, Error, Graph, TensorType};

fn adapter(name: &str) -> AdapterSummary {
    AdapterSummary {
        name: name.to_owned(),
        backend: "vulkan",
        driver: "1.0".to_owned(),
        subgroup_sizes: None,
        capabilities: Capabilities::webgpu_defaults(),
    }
}

fn choices(pairs: &[(&str, &str)]) -> KernelChoices {
    let mut choices = KernelChoices::default();
    for (operation, kernel) in pairs {
        choices.insert(*operation, *kernel);
    }
    choices
}

#[test]
fn a_file_keeps_the_choices_of_each_adapter_apart() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("kernels.json");
    let mut file = TunedKernels::default();
    file.insert(
        &adapter("one"),
        &choices(&[("matmul a", "x"), ("matmul b", "y")]),
    );
    file.insert(&adapter("other"), &choices(&[("matmul a", "z")]));
    file.save(&path).expect("a folder that can be written to");

    let mut read = TunedKernels::load(&path).expect("the file just written");
    assert_eq!(read, file);
    // Of the same adapter: the later choice stands, what it does not name stays.
    read.insert(&adapter("one"), &choices(&[("matmul b", "w")]));
    assert_eq!(
        read.choices(&adapter("one")),
        choices(&[("matmul a", "x"), ("matmul b", "w")])
    );
    assert_eq!(
        read.choices(&adapter("other")),
        choices(&[("matmul a", "z")])
    );
    assert!(read.choices(&adapter("a third")).is_empty());
    let names: Vec<_> = read.adapters().collect();
    assert_eq!(names, ["one (vulkan)", "other (vulkan)"]);
    let left: Vec<_> = fs::read_dir(&folder).expect("the folder").collect();
    assert_eq!(left.len(), 1, "a temporary file was left: {left:?}");
}

#[test]
fn damaged_files_of_kernels_are_refused() {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("kernels.json");
    let mut file = TunedKernels::default();
    file.insert(&adapter("one"), &choices(&[("matmul a", "x")]));
    let whole = file.to_json();
    for cut in [0, 1, whole.len() / 2, whole.len() - 3] {
        fs::write(&path, &whole[..cut]).expect("a file of its own");
        assert_error!(
            TunedKernels::load(&path),
            Error::Format { .. },
            "kernels.json",
            "line"
        );
    }
    let replaced = |from: &str, to: &str| {
        assert!(whole.contains(from), "there is no {from} in {whole}");
        TunedKernels::from_json(&whole.replacen(from, to, 1), &path)
    };
    assert_error!(
        replaced("rankmix kernels", "something else"),
        Error::Format { .. },
        "something else",
        "rankmix kernels"
    );
    assert_error!(
        replaced("\"version\": 1", "\"version\": 2"),
        Error::Format { .. },
        "version is 2",
        "reads 1"
    );
    assert_error!(
        replaced("\"x\"", "17"),
        Error::Format { .. },
        "expected a string"
    );
    assert_error!(
        replaced("\"version\"", "\"more\": 1, \"version\""),
        Error::Format { .. },
        "unknown field `more`"
    );
    assert_error!(
        TunedKernels::load(folder.path().join("absent")),
        Error::File { .. },
        "absent"
    );
    assert_error!(
        file.save(folder.path().join("no folder/kernels.json")),
        Error::File { .. },
        "no folder"
    );
}

#[test]
fn the_cpu_executor_has_nothing_to_choose() {
    let mut graph = Graph::new();
    let [a, b] = ["a", "b"].map(|name| {
        let input = graph.input(name, TensorType::f32([4, 4]));
        input.expect("a name of its own")
    });
    let product = graph.matmul(a, b).expect("matrices that fit");
    graph.output(product).expect("a value of this graph");
    let device = Device::cpu();
    let tuning = device.tune(&graph).expect("there is nothing to measure");
    assert!(tuning.operations.is_empty());
    device.choose_kernels(choices(&[("matmul a", "x")]));
    assert!(device.kernels().is_empty());
}
