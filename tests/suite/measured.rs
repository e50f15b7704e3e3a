//! Every operation is among what `rankmix roofline` and `cargo bench` measure: a new one cannot be forgotten there.

use std::collections::BTreeSet;

use libtest_mimic::{Failed, Trial};
use rankmix::graph::{Cost, OperationCost};
use rankmix::{Graph, Precision, Result, TensorType, Value};

use crate::measured::roofline::Case;
use crate::{cases, everything};

#[expect(
    dead_code,
    reason = "names, sizes and amounts are for those who measure"
)]
#[path = "../../benches/operations/mod.rs"]
mod benched;
#[path = "../../src/bin/rankmix/roofline/cases/mod.rs"]
mod roofline;

/// Functions that one kernel computes element by element, and the one of them that stands for all.
const FAMILIES: [(&str, &[&str]); 2] = [
    ("add", &["sub", "mul", "div"]),
    (
        "tanh",
        &[
            "affine",
            "square",
            "sqrt",
            "reciprocal",
            "exp",
            "ln",
            "tanh_slope",
            "sigmoid",
        ],
    ),
];

/// What the arithmetic of a device is measured with: it is the limit itself.
const LIMIT: &str = "multiply_adds";

/// What a function is measured as.
fn family(op: &'static str) -> &'static str {
    let found = FAMILIES.iter().find(|(_, others)| others.contains(&op));
    found.map_or(op, |(stands, _)| stands)
}

/// The operations of a graph that have anything to do.
fn operations(graph: &Graph) -> Result<BTreeSet<&'static str>> {
    let costs = graph.operation_costs()?.into_iter();
    let working = costs.filter(|one| one.cost != Cost::default());
    Ok(working.map(|one| family(one.op)).collect())
}

/// Those of all cases and of training with every option, which reach every entry point of every kernel.
fn all_operations() -> Result<BTreeSet<&'static str>> {
    let mut all = BTreeSet::new();
    for case in cases::all() {
        all.extend(operations(&case.graph(Precision::F32)?)?);
    }
    for precision in [Precision::F32, Precision::F16] {
        for graph in everything::graphs(precision) {
            all.extend(operations(&graph)?);
        }
    }
    if !all.remove(LIMIT) {
        all.insert("no operation is called so any more");
    }
    Ok(all)
}

/// A graph of operands of these types, and the operands.
fn on_operands(types: impl Iterator<Item = TensorType>) -> Result<(Graph, Vec<Value>)> {
    let mut graph = Graph::new();
    let values: Result<Vec<Value>> = types
        .enumerate()
        .map(|(number, ty)| graph.input(&format!("operand {number}"), ty))
        .collect();
    let values = values?;
    Ok((graph, values))
}

/// What a case of the program measures: the operations that come after those that are in front.
fn measured_by(case: &Case) -> Result<Vec<OperationCost>> {
    let (mut graph, operands) = on_operands(case.operands.iter().map(|(ty, _)| ty.clone()))?;
    let before = (case.prepare)(&mut graph, &operands)?;
    for &value in &before.values {
        graph.output(value)?;
    }
    let in_front = graph.operation_costs()?.len();
    for value in (case.build)(&mut graph, &operands, &before)? {
        graph.output(value)?;
    }
    let costs = graph.operation_costs()?.into_iter();
    Ok(costs.skip(in_front).collect())
}

fn all_are_among(measured: &BTreeSet<&'static str>) -> Result<(), Failed> {
    let all = all_operations()?;
    let missed: Vec<_> = all.difference(measured).copied().collect();
    if missed.is_empty() {
        Ok(())
    } else {
        Err(format!("not measured: {}", missed.join(", ")).into())
    }
}

fn by_roofline() -> Result<(), Failed> {
    let mut measured = BTreeSet::new();
    let mut rows = BTreeSet::new();
    for case in roofline::cases()? {
        let costs = measured_by(&case)?;
        if costs.iter().all(|one| one.cost == Cost::default()) {
            return Err(format!("{} {} does nothing", case.name, case.size).into());
        }
        measured.extend(costs.iter().map(|one| family(one.op)));
        let row = format!("{} {}", case.name, case.size);
        if !rows.insert(row.clone()) {
            return Err(format!("two rows are called {row}").into());
        }
    }
    all_are_among(&measured)
}

fn by_benches() -> Result<(), Failed> {
    let mut measured = BTreeSet::new();
    for bench in benched::benches() {
        let (mut graph, operands) = on_operands(bench.inputs.into_iter())?;
        for value in (bench.build)(&mut graph, &operands)? {
            graph.output(value)?;
        }
        measured.extend(operations(&graph)?);
    }
    all_are_among(&measured)
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("measured::by_roofline", by_roofline),
        Trial::test("measured::by_benches", by_benches),
    ]
}
