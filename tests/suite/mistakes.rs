//! What goes wrong on a device comes back as a typed error, and the device, or what is on the host, lives on.

use libtest_mimic::{Failed, Trial};
use rankmix::device::{Capabilities, Launch, Launches, Shader};
use rankmix::ops::LaunchTypes;
use rankmix::{
    Device, Error, Graph, HostIo, Op, ParameterStore, Real, Result, Session, Tensor, TensorType,
    Value, host_reference,
};

use crate::devices;

fn expect(found: bool, message: impl Into<String>) -> Result<(), Failed> {
    if found {
        Ok(())
    } else {
        Err(message.into().into())
    }
}

/// y = 2 sqrt x.
fn root(device: &Device) -> Result<(Session, Value, Value)> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([5]))?;
    let root = graph.sqrt(x)?;
    let y = graph.scale(root, 2.0)?;
    graph.output(y)?;
    Ok((graph.compile(&ParameterStore::new(device))?, x, y))
}

/// Checked devices name the operation that made a NaN; on trusted ones the NaN arrives.
fn nan_is_found(device: &Device) -> Result<(), Failed> {
    let (mut session, x, y) = root(device)?;
    let inputs = |fourth: f32| Tensor::f32([5], vec![1.0, 4.0, 9.0, fourth, 1.0]);
    session.write(x, &inputs(-1.0)?)?;
    let run = session.run_reading(&[y]);
    if device.is_checked() {
        let named =
            matches!(&run, Err(Error::NotFinite { value, element: 3 }) if value.contains("sqrt"));
        expect(named, format!("{run:?}"))?;
        let written = session.write(x, &inputs(f32::NAN)?);
        expect(
            matches!(&written, Err(Error::NotFinite { element: 3, .. })),
            format!("{written:?}"),
        )?;
    } else {
        expect(
            run?[0].to_f32()[3].is_nan(),
            "the square root of -1 is not NaN",
        )?;
    }
    session.write(x, &inputs(16.0)?)?;
    let y = session.run_reading(&[y])?.remove(0).to_f32();
    expect(
        y == [2.0, 4.0, 6.0, 8.0, 2.0],
        format!("after the mistake: {y:?}"),
    )
}

fn a_tensor_over_the_binding_limit_is_refused(device: &Device) -> Result<(), Failed> {
    let Some(adapter) = device.adapter() else {
        return Ok(());
    };
    let limit = adapter
        .capabilities
        .max_binding_bytes
        .min(adapter.capabilities.max_buffer_bytes);
    let elements = (limit / 4) as usize + 1024;
    let mut graph = Graph::new();
    let Ok(x) = graph.input("x", TensorType::f32([elements])) else {
        // More than a tensor can have on any device: the graph has refused it already.
        return Ok(());
    };
    let y = graph.square(x)?;
    graph.output(y)?;
    let compiled = graph.compile(&ParameterStore::new(device));
    expect(
        matches!(&compiled, Err(Error::Limit { limit: l, .. }) if *l == limit),
        format!("{compiled:?}"),
    )
}

/// An operation of an application's own, with WGSL that does not compile.
#[derive(Debug)]
struct Broken;

impl Broken {
    fn reference<R: Real>(&self, mut io: HostIo<'_, R>) -> Result<()> {
        io.floats_out(0)?.copy_from_slice(io.floats(0)?);
        Ok(())
    }
}

impl Op for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        Ok(inputs.to_vec())
    }

    fn launches(&self, _io: LaunchTypes<'_>, _capabilities: &Capabilities) -> Result<Launches> {
        Ok(Launch::new(
            Shader {
                name: "broken",
                source: "fn main( {",
            },
            "main",
        )
        .into())
    }

    host_reference!();
}

fn a_shader_that_does_not_compile_is_an_error(device: &Device) -> Result<(), Failed> {
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([2]))?;
    let y = graph.apply(Broken, &[x])?[0];
    graph.output(y)?;
    let compiled = graph.compile(&ParameterStore::new(device));
    if device.adapter().is_some() {
        expect(
            matches!(&compiled, Err(Error::Gpu { thing, .. }) if thing == "broken"),
            format!("{compiled:?}"),
        )?;
    }
    let sum = graph.sum_all(y)?;
    let gradients = graph.gradients(sum, &[x]);
    expect(
        matches!(gradients, Err(Error::NoGradient { op: "broken" })),
        format!("{gradients:?}"),
    )?;
    // The device lives on.
    let (mut session, x, y) = root(device)?;
    session.write(x, &Tensor::f32([5], vec![4.0; 5])?)?;
    expect(
        session.run_reading(&[y])?[0].to_f32() == [4.0; 5],
        "the device is not what it was",
    )
}

pub fn trials() -> Vec<Trial> {
    let mut trials = devices::trials("mistakes::nan_is_found", nan_is_found);
    trials.extend(devices::trials(
        "mistakes::a_tensor_over_the_binding_limit_is_refused",
        a_tensor_over_the_binding_limit_is_refused,
    ));
    trials.extend(devices::trials(
        "mistakes::a_shader_that_does_not_compile_is_an_error",
        a_shader_that_does_not_compile_is_an_error,
    ));
    trials
}
