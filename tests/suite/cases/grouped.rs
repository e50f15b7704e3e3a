//! Routing, sorting, and the grouped products.

use rankmix::ops::{Layout, Routed};
use rankmix::{Graph, Result, Tensor, Value};

use crate::case::{Case, floats, floats_in, ints};
use crate::popularity::{Popularity, choose};

/// inputs: experts, gates
fn routed(graph: &mut Graph, experts: Value, gates: Value, count: usize) -> Result<Routed> {
    Ok(Routed {
        gates,
        segments: graph.segments(experts, count)?,
    })
}

fn grouped(
    tokens: usize,
    top_k: usize,
    experts: usize,
    out: usize,
    input: usize,
    popularity: Popularity,
) -> Vec<Case> {
    let mut cases = Vec::new();
    for layout in [Layout::OutIn, Layout::InOut] {
        let weight = if layout == Layout::OutIn {
            [experts, out, input]
        } else {
            [experts, input, out]
        };
        let chosen = choose(popularity, tokens, top_k, experts);
        let name = format!("{layout:?}_{tokens}_{top_k}_{experts}_{out}_{input}_{popularity:?}");
        let gates = floats_in(&[tokens, top_k], 40, 0.1, 1.0);
        let inputs = vec![
            chosen.clone(),
            floats(&[tokens, input], 41),
            floats(&weight, 42),
        ];
        cases.push(Case::new(format!("shrink_{name}"), inputs, move |g, v| {
            let segments = g.segments(v[0], experts)?;
            Ok(vec![g.shrink(v[1], v[2], layout, segments)?])
        }));
        let pairs = tokens * top_k;
        let inputs = vec![
            chosen.clone(),
            floats(&[pairs, input], 43),
            floats(&weight, 44),
        ];
        cases.push(Case::new(
            format!("shrink_pairs_{name}"),
            inputs,
            move |g, v| {
                let segments = g.segments(v[0], experts)?;
                Ok(vec![g.shrink(v[1], v[2], layout, segments)?])
            },
        ));
        let inputs = vec![
            chosen,
            gates,
            floats(&[pairs, input], 45),
            floats(&weight, 46),
            floats(&[tokens, out], 47),
        ];
        cases.push(Case::new(format!("expand_{name}"), inputs, move |g, v| {
            let routed = routed(g, v[0], v[1], experts)?;
            let base = g.square(v[4])?;
            Ok(vec![g.expand(
                v[2],
                v[3],
                layout,
                routed,
                1.75,
                Some(base),
            )?])
        }));
    }
    cases
}

/// Shrink, rotation gate and rotation in one, with both results used.
fn rotated(
    tokens: usize,
    top_k: usize,
    experts: usize,
    rank: usize,
    input: usize,
    popularity: Popularity,
) -> Case {
    let name = format!("rotated_shrink_{tokens}_{top_k}_{experts}_{rank}_{input}_{popularity:?}");
    let inputs = vec![
        choose(popularity, tokens, top_k, experts),
        floats(&[tokens, input], 48),
        floats(&[experts, rank, input], 49),
        // Angles of a radian or so: of large ones what is stored in 16 bits keeps few digits.
        floats_in(&[experts, rank / 2, input], 50, -0.4, 0.4),
    ];
    Case::new(name, inputs, move |g, v| {
        let segments = g.segments(v[0], experts)?;
        // The rows have a gradient from elsewhere too.
        let x = g.scale(v[1], 1.5)?;
        let [rotated, angles] = g.rotated_shrink(x, v[2], v[3], segments)?;
        Ok(vec![rotated, angles, g.square(x)?])
    })
}

/// Rotated latents that a gated expand reads, and if `used_twice` something else too.
fn rotated_expand(
    [tokens, top_k, experts, rank]: [usize; 4],
    used_twice: bool,
    popularity: Popularity,
) -> Case {
    let name = format!(
        "rotated_expand_{tokens}_{top_k}_{experts}_{rank}_{popularity:?}{}",
        if used_twice { "_used_twice" } else { "" }
    );
    let (input, out) = (8, 5);
    let inputs = vec![
        choose(popularity, tokens, top_k, experts),
        floats(&[tokens, top_k], 51),
        floats(&[tokens, input], 52),
        floats(&[experts, rank, input], 53),
        floats_in(&[experts, rank / 2, input], 54, -0.4, 0.4),
        floats(&[experts, out, rank], 55),
    ];
    Case::new(name, inputs, move |g, v| {
        let routed = routed(g, v[0], v[1], experts)?;
        let [rotated, angles] = g.rotated_shrink(v[2], v[3], v[4], routed.segments)?;
        let y = g.expand(rotated, v[5], Layout::OutIn, routed, 0.75, None)?;
        let mut results = vec![y];
        if used_twice {
            results.extend([g.square(rotated)?, angles, g.square(v[1])?]);
        }
        Ok(results)
    })
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for popularity in Popularity::ALL {
        for used_twice in [false, true] {
            cases.push(rotated_expand([5, 2, 4, 4], used_twice, popularity));
        }
        cases.push(rotated_expand([133, 3, 7, 36], false, popularity).forward_only());
        cases.push(rotated(5, 2, 4, 4, 8, popularity));
        cases.push(rotated(133, 3, 7, 36, 20, popularity).forward_only());
    }
    for (tokens, top_k, experts, rank, input) in [
        (1, 1, 1, 4, 4),
        (3, 2, 2, 2, 5),
        (7, 1, 3, 8, 12),
        (2, 3, 3, 6, 8),
    ] {
        cases.push(rotated(
            tokens,
            top_k,
            experts,
            rank,
            input,
            Popularity::Uniform,
        ));
    }
    for popularity in Popularity::ALL {
        cases.extend(grouped(5, 2, 4, 3, 6, popularity));
        cases.extend(
            grouped(133, 3, 7, 20, 36, popularity)
                .into_iter()
                .map(Case::forward_only),
        );
    }
    for (tokens, top_k, experts, out, input) in [
        (1, 1, 1, 1, 1),
        (1, 2, 2, 5, 4),
        (2, 3, 3, 4, 7),
        (3, 1, 5, 2, 8),
    ] {
        cases.extend(grouped(
            tokens,
            top_k,
            experts,
            out,
            input,
            Popularity::Uniform,
        ));
    }
    for (tokens, top_k, experts, out, input) in [
        (7, 8, 64, 65, 33),
        (70, 1, 3, 128, 16),
        (33, 2, 300, 16, 128),
    ] {
        cases.extend(
            grouped(tokens, top_k, experts, out, input, Popularity::Uniform)
                .into_iter()
                .map(Case::forward_only),
        );
    }
    for renormalize in [true, false] {
        for (tokens, experts, top_k) in [(1, 1, 1), (3, 5, 2), (4, 3, 3), (2, 6, 1)] {
            let name = format!("route_{renormalize}_{tokens}_{experts}_{top_k}");
            cases.push(Case::new(
                name,
                vec![floats_in(&[tokens, experts], 50, -3.0, 3.0)],
                move |g, v| {
                    let routed = g.route(v[0], top_k, renormalize)?;
                    Ok(vec![
                        routed.gates,
                        routed.experts(),
                        routed.segments.order(),
                        routed.segments.offsets(),
                    ])
                },
            ));
        }
        for (tokens, experts, top_k) in [(133, 64, 8), (70, 7, 7), (200, 300, 3)] {
            let name = format!("route_{renormalize}_{tokens}_{experts}_{top_k}");
            let logits = floats_in(&[tokens, experts], 51, -3.0, 3.0);
            let upstream = floats(&[tokens, top_k], 52);
            cases.push(
                Case::new(name, vec![logits, upstream], move |g, v| {
                    let routed = g.route(v[0], top_k, renormalize)?;
                    let weighted = g.mul(routed.gates, v[1])?;
                    let sum = g.sum_all(weighted)?;
                    let gradient = g.gradients(sum, &[v[0]])?;
                    Ok(vec![
                        routed.gates,
                        routed.experts(),
                        routed.segments.order(),
                        routed.segments.offsets(),
                        gradient[0],
                    ])
                })
                .forward_only(),
            );
        }
    }
    // Equal logits: the lower expert first.
    let ties = Tensor::f64(
        [2, 5],
        vec![1.0, 2.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    )
    .expect("10 elements");
    cases.push(
        Case::new("route_ties", vec![ties], |g, v| {
            let routed = g.route(v[0], 4, true)?;
            Ok(vec![routed.gates, routed.experts()])
        })
        .forward_only(),
    );
    // Logits given as they are, past what a case does to its inputs: zeros of both signs are equal, masks are the lowest float, and one
    // expert that takes nearly all leaves the others' gradients their digits.
    let lowest = f64::from(f32::MIN);
    for (name, logits, top_k, renormalize) in [
        ("zeros", [-0.0, 0.0, -1.0, -0.0], 2, true),
        ("masks", [lowest; 4], 2, true),
        ("one_open", [lowest, lowest, 0.5, lowest], 1, false),
        ("decided", [17.0, 0.0, -0.7, 1.5], 1, false),
        ("decided", [10.0, 0.0, -0.7, 1.5], 2, false),
        ("decided", [12.0, 11.0, -0.7, 1.5], 3, false),
    ] {
        let upstream = floats(&[1, top_k], 54);
        let build = move |g: &mut Graph, v: &[Value]| {
            let logits = g.constant(Tensor::f64([1, 4], logits.to_vec())?)?;
            let routed = g.route(logits, top_k, renormalize)?;
            let weighted = g.mul(routed.gates, v[0])?;
            let sum = g.sum_all(weighted)?;
            let gradient = g.gradients(sum, &[logits])?[0];
            Ok(vec![routed.gates, routed.experts(), gradient])
        };
        let name = format!("route_{name}_{top_k}_of_4");
        cases.push(Case::new(name, vec![upstream], build).forward_only());
    }
    for (count, limit) in [
        (1, 1),
        (5, 3),
        (1000, 256),
        (777, 257),
        (3000, 70_000),
        (20_000, 9),
        (500, 20_000_000),
    ] {
        cases.push(
            Case::new(
                format!("sort_{count}_{limit}"),
                vec![ints(&[count], 53, limit as u32)],
                move |g, v| {
                    let sorted = g.sort_by_key(v[0], limit)?;
                    Ok(vec![sorted.order, sorted.offsets])
                },
            )
            .forward_only(),
        );
    }
    cases
}
