//! `rankmix devices`.

use rankmix::device::AdapterSummary;
use rankmix::{Device, Result};

fn describe(adapter: &AdapterSummary) {
    let c = &adapter.capabilities;
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let yes = |has: bool| if has { "yes" } else { "no" };
    println!("{} ({}, {})", adapter.name, adapter.backend, c.class.name());
    println!("  driver                {}", adapter.driver);
    println!("  storage binding       {}", mib(c.max_binding_bytes));
    println!("  buffer                {}", mib(c.max_buffer_bytes));
    println!("  storage buffers       {} a kernel", c.max_storage_buffers);
    println!(
        "  workgroup             {} invocations, {} KiB",
        c.max_invocations_per_workgroup,
        c.max_workgroup_bytes >> 10
    );
    println!(
        "  grid                  {} workgroups a dimension",
        c.max_workgroups_per_dimension
    );
    println!("  f16                   {}", yes(c.f16));
    let subgroups = match adapter.subgroup_sizes {
        Some([smallest, largest]) if smallest == largest => format!("yes, of {smallest}"),
        Some([smallest, largest]) => format!("yes, of {smallest} to {largest}"),
        None => "no".to_owned(),
    };
    println!("  subgroups             {subgroups}");
    println!("  timestamps            {}", yes(c.timestamps));
}

pub(crate) fn run() -> Result<()> {
    let adapters = Device::list()?;
    for adapter in &adapters {
        describe(adapter);
        println!();
    }
    if adapters.is_empty() {
        println!("no GPU adapter found");
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    println!("CPU executor (cpu)");
    println!("  threads               {threads}");
    Ok(())
}
