//! The other parts of a model, at the sizes of a small one.

use rankmix::ops::AdamWConstants;
use rankmix::{Graph, Init, TensorType, Value};

use super::{Before, Case, TOKENS, WIDTH, backward, case, f};

pub(super) fn cases() -> Vec<Case> {
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
        backward(
            "embedding backward",
            "512 of 1024x1024",
            vec![f(&[WIDTH, WIDTH]), labels(), x.clone()],
            &[0],
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
                Ok(Before::values(vec![
                    graph.cross_entropy(values[0], values[1])?,
                ]))
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
