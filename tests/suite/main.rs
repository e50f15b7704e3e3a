//! Everything that is tested on every device there is. A test is named AREA::CASE::DEVICE_MODE; one whose device is not there is
//! ignored, by name and with the reason.

mod accumulation;
mod case;
mod cases;
mod comol;
mod comol_shapes;
mod costs;
mod devices;
mod everything;
mod foreign_kernels;
mod golden;
mod gradients;
mod host;
mod kernels;
mod launches;
mod layers;
mod long_sums;
mod losses;
mod measured;
mod memory;
mod metrics;
mod mistakes;
mod moe_facts;
mod moe_shapes;
mod noise;
mod parity;
mod pipeline_cache;
mod popularity;
mod program;
mod random;
mod recomputation;
mod rotation_facts;
mod route_and_sort;
mod routing_facts;
mod shaders;
mod storage;
mod threads;
mod training;
mod tuning;

use std::path::Path;

use libtest_mimic::Arguments;

fn main() {
    if let Some(folder) = std::env::var_os("RANKMIX_WRITE_KERNELS") {
        return write_kernels(Path::new(&folder));
    }
    let arguments = Arguments::from_args();
    if !arguments.list {
        print!("{}", devices::describe());
    }
    let trials = [
        comol::trials(),
        comol_shapes::trials(),
        costs::trials(),
        accumulation::trials(),
        everything::trials(),
        foreign_kernels::trials(),
        gradients::trials(),
        parity::trials(),
        pipeline_cache::trials(),
        program::trials(),
        golden::trials(),
        host::trials(),
        launches::trials(),
        layers::trials(),
        long_sums::trials(),
        losses::trials(),
        measured::trials(),
        memory::trials(),
        mistakes::trials(),
        recomputation::trials(),
        noise::trials(),
        moe_facts::trials(),
        moe_shapes::trials(),
        rotation_facts::trials(),
        route_and_sort::trials(),
        routing_facts::trials(),
        shaders::trials(),
        storage::trials(),
        threads::trials(),
        training::trials(),
        tuning::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// Instead of testing: writes every kernel into a folder, for other compilers to judge, and the kernels with a fault into `faults` in it.
fn write_kernels(folder: &Path) {
    let faults = folder.join("faults");
    std::fs::create_dir_all(&faults).expect("a folder that can be written");
    for (kernels, folder) in [(kernels::all(), folder), (kernels::faults::all(), &faults)] {
        let findings =
            kernels::write::write(&kernels, folder).expect("a folder that can be written");
        println!("{} kernels, {findings} findings", kernels.len());
    }
}
