//! How many kernels the adapter layers launch, counted without a device.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{AdapterClass, Capabilities};
use rankmix::layers::{
    AdapterOptions, CoMol, CoreRouting, Linear, Lora, MoeLora, RotMole, Routing,
};
use rankmix::{Graph, Result, TensorType, Value};

/// Kernels of a layer's output, and of the output with the gradients of the input and of all that is trained.
type Counts = [usize; 2];

/// A software adapter with subgroups, a GPU, and a software adapter without subgroups.
fn adapters() -> [Capabilities; 3] {
    [
        Capabilities {
            class: AdapterClass::Software,
            subgroups: true,
            subgroup_size: Some(8),
            ..Capabilities::webgpu_defaults()
        },
        Capabilities {
            class: AdapterClass::Discrete,
            ..Capabilities::webgpu_defaults()
        },
        Capabilities {
            class: AdapterClass::Software,
            ..Capabilities::webgpu_defaults()
        },
    ]
}

fn counts(
    capabilities: &Capabilities,
    layer: impl Fn(&mut Graph, Value) -> Result<Value>,
) -> Result<Counts> {
    let count = |with_gradients: bool| -> Result<usize> {
        let mut graph = Graph::new();
        graph.set_training(true);
        let x = graph.input("x", TensorType::f32([512, 1024]))?;
        let output = layer(&mut graph, x)?;
        graph.output(output)?;
        if with_gradients {
            let upstream = graph.input("upstream", graph.ty(output)?.clone())?;
            let wanted: Vec<Value> = std::iter::once(x).chain(graph.trainable()).collect();
            for gradient in graph.gradients_from(&[(output, upstream)], &wanted)? {
                graph.output(gradient)?;
            }
        }
        Ok(graph.launches(capabilities, false)?.len())
    };
    Ok([count(false)?, count(true)?])
}

/// Counts that are not as expected.
#[derive(Default)]
struct Mismatches(Vec<String>);

impl Mismatches {
    /// The counts of a layer on each adapter.
    fn expect(
        &mut self,
        what: &str,
        expected: [Counts; 3],
        layer: impl Fn(&mut Graph, Value) -> Result<Value>,
    ) -> Result<()> {
        for (capabilities, expected) in adapters().iter().zip(expected) {
            let found = counts(capabilities, &layer)?;
            if found != expected {
                self.0.push(format!(
                    "{what} on a {} adapter: {found:?} launches, expected {expected:?}",
                    capabilities.class.name()
                ));
            }
        }
        Ok(())
    }

    fn none(self) -> Result<(), Failed> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(self.0.join("\n").into())
    }
}

fn base() -> Linear {
    Linear::new("layer", 1024, 1024)
}

fn options() -> AdapterOptions {
    AdapterOptions::new(16, 32.0)
}

fn comol() -> Result<(), Failed> {
    let mut counts = Mismatches::default();
    let layer = CoMol::new(base(), options(), 8)?;
    let of = |layer: &CoMol| {
        let layer = layer.clone();
        move |graph: &mut Graph, x| Ok(layer.forward(graph, x)?.output)
    };
    counts.expect("CoMoL", [[4, 10], [4, 10], [4, 11]], of(&layer))?;
    let mut dropping = layer.clone();
    dropping.options = options().with_dropout(0.1);
    // The mask forward and, as dx is then the sum of two, backward.
    counts.expect(
        "CoMoL with dropout",
        [[5, 13], [5, 13], [5, 13]],
        of(&dropping),
    )?;
    let raw = layer.clone().with_routing(CoreRouting::Raw);
    counts.expect(
        "CoMoL with raw routing",
        [[6, 15], [6, 16], [6, 16]],
        of(&raw),
    )?;
    let sparse = layer.with_top_k(2)?;
    counts.expect("CoMoL with top 2", [[6, 15], [6, 15], [6, 16]], of(&sparse))?;
    counts.none()
}

fn others() -> Result<(), Failed> {
    let mut counts = Mismatches::default();
    let routing = Routing::new(8, 2);
    let rotated = RotMole::new(base(), options(), routing)?;
    counts.expect("RotMoLE", [[6, 15], [5, 16], [5, 16]], |graph, x| {
        Ok(rotated.forward(graph, x)?.output)
    })?;
    let mixture = MoeLora::new(base(), options(), routing)?;
    counts.expect("MoE-LoRA", [[6, 15], [5, 14], [5, 14]], |graph, x| {
        Ok(mixture.forward(graph, x)?.output)
    })?;
    let lora = Lora::new(base(), options())?;
    counts.expect("LoRA", [[3, 7], [3, 7], [3, 8]], |graph, x| {
        lora.forward(graph, x)
    })?;
    counts.none()
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("launches::comol", comol),
        Trial::test("launches::rotmole_moe_lora_and_lora", others),
    ]
}
