//! Kernels of an application's own under 16-bit storage: rewritten where their text can be, refused where it cannot, never run on halves
//! that they would take for floats.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{Capabilities, Launch, Launches, Shader, Slot};
use rankmix::ops::LaunchTypes;
use rankmix::{Graph, HostIo, Op, Precision, Real, Result, TensorType, host_reference};

/// Doubles floats, with a kernel whose first binding is written in one way or another.
#[derive(Clone, Copy, Debug)]
struct Double {
    shader: Shader,
}

impl Double {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        let given = io.floats(0)?;
        for (result, &given) in io.floats_out(0)?.iter_mut().zip(given) {
            *result = given + given;
        }
        Ok(())
    }
}

impl Op for Double {
    fn name(&self) -> &'static str {
        "double"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Ok(inputs.to_vec())
    }

    fn launches(&self, io: LaunchTypes<'_>, _: &Capabilities) -> Result<Launches> {
        let count = io.inputs[0].elements();
        let launch = Launch::new(self.shader, "forward")
            .read(1, Slot::Input(0))
            .write(2, Slot::Output(0))
            .param(count)
            .grid([count as u32, 1, 1]);
        Ok(launch.into())
    }

    host_reference!();
}

macro_rules! double {
    ($given:literal, $read:literal) => {
        Shader {
            name: "double",
            source: concat!(
                "struct Params { count: u32 }\n@group(0) @binding(0) var<uniform> params: Params;\n",
                $given,
                "\n@group(0) @binding(2) var<storage, read_write> result: array<f32>;\n",
                "@compute @workgroup_size(1)\nfn forward(@builtin(workgroup_id) workgroup: vec3<u32>) {\n",
                "  let i = workgroup.x;\n  if (i < params.count) { result[i] = 2.0 * ",
                $read,
                "; }\n}\n"
            ),
        }
    };
}

/// The launches of the kernel on a value in 16 bits, or why there are none.
fn launches(shader: Shader, f16: bool) -> Result<Vec<Launch>> {
    let mut graph = Graph::new();
    graph.set_precision(Precision::F16);
    let x = graph.input("x", TensorType::f32([7]))?;
    let half = graph.scale(x, 1.0)?;
    let doubled = graph.apply(Double { shader }, &[half])?[0];
    graph.output(doubled)?;
    let capabilities = Capabilities {
        f16,
        ..Capabilities::webgpu_defaults()
    };
    graph.launches(&capabilities, false)
}

fn only_what_can_be_rewritten_runs() -> Result<(), Failed> {
    let plain = double!(
        "@group(0) @binding(1) var<storage, read> given: array<f32>;",
        "given[i]"
    );
    for f16 in [true, false] {
        let found = launches(plain, f16)?;
        if !found
            .iter()
            .any(|launch| launch.shader.name.starts_with("double (f16"))
        {
            return Err(format!("the kernel is not rewritten: {found:?}").into());
        }
    }
    let refused = [
        double!(
            "@group(0) @binding(1)\nvar<storage, read> given: array<f32>;",
            "given[i]"
        ),
        double!(
            "@binding(1) @group(0) var<storage, read> given: array<f32>;",
            "given[i]"
        ),
        double!(
            "struct Pair { a: f32, b: f32 }\n@group(0) @binding(1) var<storage, read> given: array<Pair>;",
            "given[i / 2u].a"
        ),
        double!(
            "@group(0) @binding(1) var<storage, read> given: array<f32>;",
            "given[min(i, arrayLength(&given) - 1u)]"
        ),
    ];
    for shader in refused {
        for f16 in [true, false] {
            if let Ok(found) = launches(shader, f16) {
                return Err(format!("{}\nwas taken: {found:?}", shader.source).into());
            }
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    vec![Trial::test(
        "foreign_kernels::only_what_can_be_rewritten_runs",
        only_what_can_be_rewritten_runs,
    )]
}
