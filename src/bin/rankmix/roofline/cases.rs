//! The operations that are held against the limits, at the shapes that layers have where nothing else is said.

use rankmix::ops::{
    Activation, AdamWConstants, CoreMix, Layout, MatMul, Projection, Rotation, Routed, Segments,
};
use rankmix::{Graph, Init, Result, TensorType, Value};

/// What operations in front leave: values, and pairs sorted by expert.
#[derive(Default)]
pub(crate) struct Before {
    pub(crate) values: Vec<Value>,
    segments: Vec<Segments>,
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
    build: impl Fn(&mut Graph, &[Value], Segments) -> Result<Value> + 'static,
) -> Case {
    operands.push((TensorType::i32([tokens, top_k]), experts));
    let last = operands.len() - 1;
    Case {
        name: name.to_owned(),
        size: size.to_owned(),
        operands,
        prepare: Box::new(move |graph, values| {
            let segments = graph.segments(values[last], experts)?;
            Ok(Before {
                values: vec![segments.order(), segments.offsets()],
                segments: vec![segments],
            })
        }),
        build: Box::new(move |graph, values, before| {
            Ok(vec![build(graph, values, before.segments[0])?])
        }),
    }
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
        prepare: Box::new(move |graph, values| {
            Ok(Before {
                values: vec![forward(graph, values)?],
                ..Before::default()
            })
        }),
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
    ]
}

fn experts() -> Vec<Case> {
    let routing = [TOKENS, TOP_K, EXPERTS];
    let size = "1024 pairs, 8 experts, 1024 to 16";
    let back = "1024 pairs, 8 experts, 16 to 1024";
    let (a, b) = (f(&[EXPERTS, RANK, WIDTH]), f(&[EXPERTS, WIDTH, RANK]));
    let (x, z, gates) = (f(&[TOKENS, WIDTH]), f(&[PAIRS, RANK]), f(&[TOKENS, TOP_K]));
    let expand = |g: &mut Graph, v: &[Value], segments| {
        let routed = Routed {
            gates: v[2],
            segments,
        };
        g.expand(v[0], v[1], Layout::OutIn, routed, 2.0, None)
    };
    // A feed-forward layer's.
    let routing_wide = [256, TOP_K, EXPERTS];
    let hidden = "512 pairs, 8 experts, 512 to 256";
    let up = f(&[EXPERTS, 256, 512]);
    vec![
        grouped(
            "shrink",
            size,
            vec![x.clone(), a.clone()],
            routing,
            |g, v, segments| g.shrink(v[0], v[1], Layout::OutIn, segments),
        ),
        grouped(
            "expand",
            back,
            vec![z.clone(), b.clone(), gates.clone()],
            routing,
            expand,
        ),
        grouped(
            "segment_outer",
            size,
            vec![x.clone(), a, z.clone()],
            routing,
            |g, v, segments| {
                let z = g.shrink(v[0], v[1], Layout::OutIn, segments)?;
                Ok(g.gradients_from(&[(z, v[2])], &[v[1]])?[0])
            },
        ),
        grouped(
            "segment_outer gated",
            back,
            vec![z, b, gates, x],
            routing,
            move |g, v, segments| {
                let y = expand(g, v, segments)?;
                Ok(g.gradients_from(&[(y, v[3])], &[v[1]])?[0])
            },
        ),
        grouped(
            "gated_experts",
            hidden,
            vec![f(&[256, 512]), up.clone(), up],
            routing_wide,
            |g, v, segments| {
                let of = |weight| Projection { x: v[0], weight };
                g.gated_experts(Activation::Silu, of(v[1]), Some(of(v[2])), segments, None)
            },
        ),
        grouped(
            "expand wide",
            "512 pairs, 8 experts, 256 to 512",
            vec![f(&[512, 256]), f(&[EXPERTS, 512, 256]), f(&[256, TOP_K])],
            routing_wide,
            expand,
        ),
    ]
}

fn rotations() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for rotation in Rotation::ALL {
        let z = f(&[PAIRS, RANK]);
        let operands = vec![z.clone(), f(&[PAIRS, rotation.numbers(RANK)?])];
        let rotate = move |g: &mut Graph, v: &[Value]| g.rotate(rotation, v[0], v[1]);
        let size = format!("{PAIRS}x{RANK}");
        let with_upstream = operands.iter().cloned().chain([z]).collect();
        let name = format!("rotate {rotation}");
        cases.push(case(name.clone(), size.clone(), operands, rotate));
        let name = format!("{name} backward");
        cases.push(backward(name, size, with_upstream, &[0, 1], rotate));
    }
    Ok(cases)
}

fn routing() -> Vec<Case> {
    let (z, core, gates) = (
        f(&[TOKENS, RANK]),
        f(&[EXPERTS, RANK, RANK]),
        f(&[TOKENS, EXPERTS]),
    );
    let mix = |g: &mut Graph, v: &[Value]| g.mix_cores(v[0], v[1], v[2], CoreMix::Auto);
    let upstream = vec![z.clone(), core.clone(), gates.clone(), z.clone()];
    let merge = |g: &mut Graph, v: &[Value]| Ok(g.soft_merge(v[0], v[1], v[2], CoreMix::Auto)?[2]);
    let router = f(&[EXPERTS, RANK]);
    let merged = vec![z.clone(), core.clone(), router, z.clone()];
    vec![
        case("route", "512x8, top 2", vec![gates.clone()], |g, v| {
            Ok(g.route(v[0], TOP_K, true)?.gates)
        }),
        case(
            "sort",
            "1024 pairs, 8 experts",
            vec![(TensorType::i32([TOKENS, TOP_K]), EXPERTS)],
            |g, v| Ok(g.segments(v[0], EXPERTS)?.order()),
        ),
        case("softmax", "512x8", vec![gates.clone()], |g, v| {
            g.softmax(v[0])
        }),
        backward(
            "softmax backward",
            "512x8",
            vec![gates.clone(), gates.clone()],
            &[0],
            |g, v| g.softmax(v[0]),
        ),
        case("mix_cores", "512x16, 8 experts", vec![z, core, gates], mix),
        backward(
            "mix_cores backward",
            "512x16, 8 experts",
            upstream,
            &[0, 1, 2],
            mix,
        ),
        case(
            "soft_merge",
            "512x16, 8 experts",
            merged[..3].to_vec(),
            merge,
        ),
        backward(
            "soft_merge backward",
            "512x16, 8 experts",
            merged,
            &[0, 1, 2],
            merge,
        ),
    ]
}

fn model_parts() -> Vec<Case> {
    let x = f(&[TOKENS, WIDTH]);
    let size = "512x1024";
    let labels = || (TensorType::i32([TOKENS]), WIDTH);
    let norm = |g: &mut Graph, v: &[Value]| g.rms_norm(v[0], v[1], 1e-5);
    let weighted = vec![x.clone(), f(&[WIDTH]), x.clone()];
    vec![
        case("rms_norm", size, weighted[..2].to_vec(), norm),
        backward("rms_norm backward", size, weighted, &[0, 1], norm),
        case("silu", size, vec![x.clone()], |g, v| g.silu(v[0])),
        backward(
            "silu backward",
            size,
            vec![x.clone(), x.clone()],
            &[0],
            |g, v| g.silu(v[0]),
        ),
        case("add", size, vec![x.clone(), x.clone()], |g, v| {
            g.add(v[0], v[1])
        }),
        case("sum rows", size, vec![x.clone()], |g, v| g.sum(v[0], &[1])),
        case("dropout", size, vec![x.clone()], |g, v| {
            g.dropout(v[0], 0.1)
        }),
        case(
            "embedding",
            "512 of 1024x1024",
            vec![f(&[WIDTH, WIDTH]), labels()],
            |g, v| g.embedding(v[0], v[1]),
        ),
        case("cross_entropy", size, vec![x.clone(), labels()], |g, v| {
            g.cross_entropy(v[0], v[1])
        }),
        Case {
            name: "cross_entropy backward".to_owned(),
            size: size.to_owned(),
            operands: vec![x, labels()],
            prepare: Box::new(|graph, values| {
                Ok(Before {
                    values: vec![graph.cross_entropy(values[0], values[1])?],
                    ..Before::default()
                })
            }),
            build: Box::new(|graph, values, before| {
                graph.gradients(before.values[0], &values[..1])
            }),
        },
        case(
            "adamw",
            "1024x1024",
            vec![f(&[WIDTH, WIDTH]), f(&[3])],
            |g, v| {
                let [parameter, first, second] = ["parameter", "first", "second"]
                    .map(|name| g.parameter(name, [WIDTH, WIDTH], Init::Ones, true));
                g.adamw_step(
                    parameter?,
                    [first?, second?],
                    v[0],
                    v[1],
                    None,
                    AdamWConstants::default(),
                )
            },
        ),
    ]
}

/// What memory binds, at the size of the copy that the limit comes from: 128 MiB a tensor.
fn memory_bound() -> Result<Vec<Case>> {
    const ROWS: usize = 32_768;
    let x = || f(&[ROWS, WIDTH]);
    let weight = || f(&[WIDTH]);
    let size = "32768x1024";
    let norm = |g: &mut Graph, v: &[Value]| g.rms_norm(v[0], v[1], 1e-5);
    let softmax = |g: &mut Graph, v: &[Value]| g.softmax(v[0]);
    let silu = |g: &mut Graph, v: &[Value]| g.silu(v[0]);
    let gated = |g: &mut Graph, v: &[Value]| g.activate(Activation::Silu, v[0], Some(v[1]));
    let rotate = |g: &mut Graph, v: &[Value]| g.rotate(Rotation::Planes, v[0], v[1]);
    let angles = f(&[ROWS, Rotation::Planes.numbers(WIDTH)?]);
    let step = |g: &mut Graph, v: &[Value]| {
        let [parameter, first, second] = ["parameter", "first", "second"]
            .map(|name| g.parameter(name, [ROWS, WIDTH], Init::Ones, true));
        let constants = AdamWConstants::default();
        g.adamw_step(parameter?, [first?, second?], v[0], v[1], None, constants)
    };
    Ok(vec![
        case("copy", size, vec![x()], |g, v| g.copy(v[0])),
        case("scale", size, vec![x()], |g, v| g.scale(v[0], 0.5)),
        case("tanh", size, vec![x()], |g, v| g.tanh(v[0])),
        case("add", size, vec![x(), x()], |g, v| g.add(v[0], v[1])),
        case("silu", size, vec![x()], silu),
        backward("silu backward", size, vec![x(), x()], &[0], silu),
        case("activation", size, vec![x(), x()], gated),
        backward(
            "activation backward",
            size,
            vec![x(), x(), x()],
            &[0, 1],
            gated,
        ),
        case("dropout", size, vec![x()], |g, v| g.dropout(v[0], 0.1)),
        case("rotate planes", size, vec![x(), angles.clone()], rotate),
        backward(
            "rotate planes backward",
            size,
            vec![x(), angles, x()],
            &[0, 1],
            rotate,
        ),
        case("rms_norm", size, vec![x(), weight()], norm),
        backward(
            "rms_norm input gradient",
            size,
            vec![x(), weight(), x()],
            &[0],
            norm,
        ),
        backward(
            "rms_norm weight gradient",
            size,
            vec![x(), weight(), x()],
            &[1],
            norm,
        ),
        case("softmax", size, vec![x()], softmax),
        backward("softmax backward", size, vec![x(), x()], &[0], softmax),
        case(
            "softmax",
            "1048576x8",
            vec![f(&[1 << 20, EXPERTS])],
            softmax,
        ),
        case("sum rows", size, vec![x()], |g, v| g.sum(v[0], &[1])),
        case("sum columns", size, vec![x()], |g, v| g.sum(v[0], &[0])),
        case("sum all", size, vec![x()], |g, v| g.sum_all(v[0])),
        case("adamw", size, vec![x(), f(&[3])], step),
    ])
}

/// Every case.
pub(crate) fn cases() -> Result<Vec<Case>> {
    let mut cases = products();
    cases.extend(experts());
    cases.extend(rotations()?);
    cases.extend(routing());
    cases.extend(model_parts());
    cases.extend(memory_bound()?);
    Ok(cases)
}
