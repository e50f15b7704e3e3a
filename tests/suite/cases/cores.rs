//! Softmax, and mixtures of core matrices.

use rankmix::ops::{CoreMix, Routed};
use rankmix::{Graph, Result, Tensor, Value};

use crate::case::{Case, floats, floats_in, ints};

/// Under a dense gate: tokens, experts, rank.
fn dense(mix: CoreMix, [tokens, experts, rank]: [usize; 3]) -> Case {
    let inputs = vec![
        floats(&[tokens, rank], 90),
        floats(&[experts, rank, rank], 91),
        floats(&[tokens, experts], 92),
    ];
    let name = format!("mix_cores_{mix:?}_{tokens}_{experts}_{rank}");
    Case::new(name, inputs, move |g, v| {
        Ok(vec![g.mix_cores(v[0], v[1], v[2], mix)?])
    })
}

/// Experts of tokens, `top_k` different ones each.
fn chosen([tokens, experts, top_k]: [usize; 3]) -> Tensor {
    let starts = ints(&[tokens], 93, experts as u32);
    let starts = starts.as_i32().unwrap_or_default();
    let chosen = starts
        .iter()
        .flat_map(|&start| (0..top_k).map(move |slot| (start + slot as i32) % experts as i32));
    Tensor::i32([tokens, top_k], chosen.collect()).expect("top_k experts a token")
}

/// Under a top-k gate: tokens, experts, top k, rank.
fn routed(mix: CoreMix, [tokens, experts, top_k, rank]: [usize; 4]) -> Case {
    let inputs = vec![
        floats(&[tokens, rank], 94),
        floats(&[experts, rank, rank], 95),
        floats(&[tokens, top_k], 96),
        chosen([tokens, experts, top_k]),
    ];
    let name = format!("mix_cores_{mix:?}_{tokens}_{experts}_{rank}_top{top_k}");
    Case::new(name, inputs, move |g, v| {
        let segments = g.segments(v[3], experts)?;
        let gates = v[2];
        Ok(vec![g.mix_routed_cores(
            v[0],
            v[1],
            Routed { gates, segments },
            mix,
        )?])
    })
}

/// Logits, gates and mixture of a router that looks at the latents: tokens, experts, rank. `used` are the results that the loss
/// depends on, `spread` is that of the logits.
fn soft_merge(mix: CoreMix, sizes: [usize; 3], used: &'static [usize], spread: f64) -> Case {
    let [tokens, experts, rank] = sizes;
    let inputs = vec![
        floats(&[tokens, rank], 100),
        floats(&[experts, rank, rank], 101),
        floats_in(&[experts, rank], 102, -spread, spread),
    ];
    let name = format!("soft_merge_{mix:?}_{tokens}_{experts}_{rank}_{used:?}_{spread}");
    Case::new(name, inputs, move |g, v| {
        let all = g.soft_merge(v[0], v[1], v[2], mix)?;
        let mut results: Vec<Value> = used.iter().map(|&result| all[result]).collect();
        if !used.contains(&2) {
            // Logits and gates alone do not depend on the cores.
            results.push(g.square(v[1])?);
        }
        Ok(results)
    })
}

/// Logits, gates and u.
const ALL: &[usize] = &[0, 1, 2];

fn soft_merges() -> Vec<Case> {
    let mut cases = Vec::new();
    for mix in [CoreMix::Merge, CoreMix::Apply] {
        for sizes in [[1, 1, 1], [3, 4, 2], [5, 2, 5], [2, 5, 4], [7, 3, 3]] {
            cases.push(soft_merge(mix, sizes, ALL, 1.0));
        }
        for used in [&[0], &[1], &[2], &[0, 2], &[1, 2]] as [&[usize]; 5] {
            cases.push(soft_merge(mix, [5, 3, 6], used, 2.0));
        }
        for (sizes, spread) in [
            ([133, 8, 16], 1.0),
            ([70, 64, 5], 0.5),
            ([33, 1, 64], 1.0),
            ([7, 64, 16], 4.0),
            ([300, 2, 3], 20.0),
            ([9, 19, 61], 1.0),
            // Beyond what one kernel holds.
            ([9, 65, 8], 1.0),
            ([9, 3, 68], 1.0),
            // Enough tokens for four an invocation, and some left over.
            ([1023, 9, 3], 2.0),
            ([266, 3, 16], 30.0),
            ([257, 18, 33], 1.0),
            ([130, 64, 64], 1.0),
            // The same for adapters that are not software.
            ([33_000, 2, 3], 1.0),
            ([8203, 2, 16], 1.0),
        ] {
            for used in [&[2], ALL] {
                let mut case = soft_merge(mix, sizes, used, spread);
                if used == ALL {
                    case.build = Box::new(move |g, v| {
                        let [logits, gates, u] = g.soft_merge(v[0], v[1], v[2], mix)?;
                        let mut y = u;
                        for (of, scale) in [(logits, 0.1), (gates, 2.0)] {
                            let square = g.square(of)?;
                            let sum = g.sum(square, &[1])?;
                            let sum = g.reshape(sum, [sizes[0], 1])?;
                            let sum = g.scale(sum, scale)?;
                            y = g.add(y, sum)?;
                        }
                        Ok(vec![y])
                    });
                }
                cases.push(both_ways(case, [sizes[0], sizes[2]]));
            }
        }
    }
    cases
}

/// Both directions of a case, for sizes at which central differences would take too long.
fn both_ways(mut case: Case, upstream: [usize; 2]) -> Case {
    let forward = case.build;
    let floats_of_case = case.inputs.iter().filter(|t| t.as_i32().is_none()).count();
    case.inputs.push(floats(&upstream, 97));
    case.build = Box::new(move |g: &mut Graph, v: &[Value]| -> Result<Vec<Value>> {
        let y = forward(g, &v[..v.len() - 1])?[0];
        let mut results = g.gradients_from(&[(y, v[v.len() - 1])], &v[..floats_of_case])?;
        results.push(y);
        Ok(results)
    });
    case.name = format!("{}_both_ways", case.name);
    case.forward_only()
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mix in [CoreMix::Merge, CoreMix::Apply] {
        for sizes in [[1, 1, 1], [3, 4, 2], [5, 2, 5], [2, 5, 4], [7, 3, 3]] {
            cases.push(dense(mix, sizes));
        }
        for sizes in [[1, 1, 1, 1], [3, 4, 2, 4], [5, 3, 3, 5], [2, 6, 1, 3]] {
            cases.push(routed(mix, sizes));
        }
        for sizes in [
            [133, 8, 16],
            [70, 64, 5],
            [33, 1, 64],
            [7, 64, 16],
            [300, 2, 3],
            [9, 19, 66],
            [2, 2, 130],
            // Enough tokens for four an invocation, and some left over.
            [1023, 9, 3],
            [266, 3, 16],
            [257, 18, 33],
            [70, 2, 130],
            // The same for adapters that are not software.
            [33_000, 2, 3],
            [8203, 2, 16],
        ] {
            cases.push(both_ways(dense(mix, sizes), [sizes[0], sizes[2]]));
        }
        for sizes in [[133, 8, 2, 16], [70, 64, 8, 5], [9, 20, 17, 66]] {
            cases.push(both_ways(routed(mix, sizes), [sizes[0], sizes[3]]));
        }
    }
    cases.extend(soft_merges());
    // The choice by shape takes both ways.
    cases.push(dense(CoreMix::Auto, [3, 3, 2]));
    cases.push(dense(CoreMix::Auto, [3, 2, 7]));

    for (rows, columns, spread) in [(1, 1, 1.0), (3, 5, 2.0), (2, 70, 3.0), (7, 2, 8.0)] {
        let name = format!("softmax_{rows}_{columns}_{spread}");
        let logits = floats_in(&[rows, columns], 98, -spread, spread);
        cases.push(Case::new(name, vec![logits], |g, v| {
            Ok(vec![g.softmax(v[0])?])
        }));
    }
    for (rows, columns, spread) in [(133, 64, 20.0), (2, 1500, 3.0), (65, 8, 60.0)] {
        let name = format!("softmax_{rows}_{columns}_{spread}");
        let logits = floats_in(&[rows, columns], 99, -spread, spread);
        let case = Case::new(name, vec![logits], |g, v| Ok(vec![g.softmax(v[0])?]));
        cases.push(both_ways(case, [rows, columns]));
    }
    cases
}
