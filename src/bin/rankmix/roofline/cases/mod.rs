//! The operations that are held against the limits, at the shapes that layers have where nothing else is said.

mod elements;
mod experts;
mod model_parts;
mod routing;
mod training;

use rankmix::ops::{ActiveGroups, MatMul, Product, Segments};
use rankmix::{Graph, Result, TensorType, Value};

/// What operations in front leave: values, and pairs sorted by expert.
#[derive(Default)]
pub(crate) struct Before {
    pub(crate) values: Vec<Value>,
    segments: Vec<Segments>,
    groups: Vec<ActiveGroups>,
}

impl Before {
    fn values(values: Vec<Value>) -> Self {
        Self {
            values,
            ..Self::default()
        }
    }

    /// Values that come after pairs were sorted, the sorting among what is in front.
    fn sorted(segments: Segments, more: impl IntoIterator<Item = Value>) -> Self {
        let values = [segments.order(), segments.offsets()];
        Self {
            values: values.into_iter().chain(more).collect(),
            segments: vec![segments],
            ..Self::default()
        }
    }
}

type Prepare = Box<dyn Fn(&mut Graph, &[Value]) -> Result<Before>>;
type Build = Box<dyn Fn(&mut Graph, &[Value], &Before) -> Result<Vec<Value>>>;

/// An operation to time: what it is called, its sizes, its operands (integers with their limit), operations that must come before and
/// are not timed, and the operation itself.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) size: String,
    pub(crate) operands: Vec<(TensorType, usize)>,
    pub(crate) prepare: Prepare,
    pub(crate) build: Build,
}

fn f(dims: &[usize]) -> (TensorType, usize) {
    (TensorType::f32(dims), 0)
}

fn i(dims: &[usize], limit: usize) -> (TensorType, usize) {
    (TensorType::i32(dims), limit)
}

fn case(
    name: impl Into<String>,
    size: impl Into<String>,
    operands: Vec<(TensorType, usize)>,
    build: impl Fn(&mut Graph, &[Value]) -> Result<Value> + 'static,
) -> Case {
    Case {
        name: name.into(),
        size: size.into(),
        operands,
        prepare: Box::new(|_, _| Ok(Before::default())),
        build: Box::new(move |graph, values, _| Ok(vec![build(graph, values)?])),
    }
}

/// An operation on pairs sorted by expert; the last operand holds the experts.
fn grouped(
    name: &str,
    size: &str,
    mut operands: Vec<(TensorType, usize)>,
    [tokens, top_k, experts]: [usize; 3],
    build: impl Fn(&mut Graph, &[Value], Segments) -> Result<Vec<Value>> + 'static,
) -> Case {
    operands.push(i(&[tokens, top_k], experts));
    let last = operands.len() - 1;
    Case {
        name: name.to_owned(),
        size: size.to_owned(),
        operands,
        prepare: Box::new(move |graph, values| {
            let segments = graph.segments(values[last], experts)?;
            Ok(Before::sorted(segments, []))
        }),
        build: Box::new(move |graph, values, before| build(graph, values, before.segments[0])),
    }
}

/// An operation on what another one has made of pairs sorted by expert: the third of the values in front, after the order and the offsets.
fn of_sorted(
    name: &str,
    size: &str,
    operands: Vec<(TensorType, usize)>,
    routing: [usize; 3],
    forward: impl Fn(&mut Graph, &[Value], Segments) -> Result<Vec<Value>> + 'static,
    build: impl Fn(&mut Graph, &[Value], &Before) -> Result<Vec<Value>> + 'static,
) -> Case {
    let mut case = grouped(name, size, operands, routing, |_, _, _| Ok(Vec::new()));
    let sort = case.prepare;
    case.prepare = Box::new(move |graph, values| {
        let segments = sort(graph, values)?.segments[0];
        let more = forward(graph, values, segments)?;
        Ok(Before::sorted(segments, more))
    });
    case.build = Box::new(build);
    case
}

/// The gradients of an operation's first operands (`wanted`), without the operation; the last operand is the upstream gradient.
fn backward(
    name: impl Into<String>,
    size: impl Into<String>,
    operands: Vec<(TensorType, usize)>,
    wanted: &'static [usize],
    forward: impl Fn(&mut Graph, &[Value]) -> Result<Value> + 'static,
) -> Case {
    Case {
        name: name.into(),
        size: size.into(),
        operands,
        prepare: Box::new(move |graph, values| Ok(Before::values(vec![forward(graph, values)?]))),
        build: Box::new(move |graph, values, before| {
            let upstream = values[values.len() - 1];
            let wanted: Vec<Value> = wanted.iter().map(|&operand| values[operand]).collect();
            graph.gradients_from(&[(before.values[0], upstream)], &wanted)
        }),
    }
}

const TOKENS: usize = 512;
const WIDTH: usize = 1024;
const RANK: usize = 16;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const PAIRS: usize = TOKENS * TOP_K;
/// Of a tensor of 128 MiB.
const ROWS: usize = 32_768;

fn products() -> Vec<Case> {
    let matmul = |letters: &str, [m, n, k]: [usize; 3]| {
        let (transpose_a, transpose_b) = (letters.starts_with('t'), letters.ends_with('t'));
        let sides = |transposed, rows, columns| {
            if transposed {
                f(&[columns, rows])
            } else {
                f(&[rows, columns])
            }
        };
        let options = MatMul {
            transpose_a,
            transpose_b,
            alpha: 1.0,
        };
        case(
            format!("matmul {letters}"),
            format!("{m}x{n}x{k}"),
            vec![sides(transpose_a, m, k), sides(transpose_b, k, n)],
            move |g, v| g.matmul_with(v[0], v[1], options, None),
        )
    };
    vec![
        matmul("nn", [WIDTH; 3]),
        matmul("nt", [WIDTH; 3]),
        matmul("tn", [WIDTH; 3]),
        matmul("nt", [TOKENS, RANK, WIDTH]),
        matmul("nt", [TOKENS, WIDTH, RANK]),
        matmul("tn", [RANK, WIDTH, TOKENS]),
        matmul("nt", [1, WIDTH, WIDTH]),
        matmul("nt", [16, WIDTH, WIDTH]),
        case(
            "matmul nt bias",
            format!("{TOKENS}x{WIDTH}x{WIDTH}"),
            vec![f(&[TOKENS, WIDTH]), f(&[WIDTH, WIDTH]), f(&[WIDTH])],
            |g, v| g.matmul_bias(Product::nt(v[0], v[1]), v[2]),
        ),
        case(
            "matmul nt sum",
            format!("{TOKENS}x{WIDTH}x{WIDTH}, k {RANK} more"),
            vec![
                f(&[TOKENS, WIDTH]),
                f(&[WIDTH, WIDTH]),
                f(&[TOKENS, RANK]),
                f(&[WIDTH, RANK]),
            ],
            |g, v| g.matmul_sum(Product::nt(v[0], v[1]), Product::nt(v[2], v[3])),
        ),
    ]
}

/// Every case.
pub(crate) fn cases() -> Result<Vec<Case>> {
    let mut cases = products();
    cases.extend(experts::cases());
    cases.extend(routing::rotations()?);
    cases.extend(routing::cases());
    cases.extend(model_parts::cases());
    cases.extend(elements::cases()?);
    cases.extend(training::cases());
    Ok(cases)
}
