//! Everything that is tested on every device there is. A test is named AREA::CASE::DEVICE_MODE; one whose device is not there is
//! ignored, by name and with the reason.

mod accumulation;
mod case;
mod cases;
mod comol;
mod comol_shapes;
mod devices;
mod everything;
mod foreign_kernels;
mod golden;
mod gradients;
mod host;
mod layers;
mod losses;
mod metrics;
mod mistakes;
mod moe_facts;
mod moe_shapes;
mod noise;
mod parity;
mod popularity;
mod random;
mod recomputation;
mod rotation_facts;
mod routing_facts;
mod shaders;
mod storage;
mod training;

use libtest_mimic::Arguments;

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        print!("{}", devices::describe());
    }
    let trials = [
        comol::trials(),
        comol_shapes::trials(),
        accumulation::trials(),
        everything::trials(),
        foreign_kernels::trials(),
        gradients::trials(),
        parity::trials(),
        golden::trials(),
        host::trials(),
        layers::trials(),
        losses::trials(),
        mistakes::trials(),
        recomputation::trials(),
        noise::trials(),
        moe_facts::trials(),
        moe_shapes::trials(),
        rotation_facts::trials(),
        routing_facts::trials(),
        shaders::trials(),
        storage::trials(),
        training::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
