//! Routing and sorting up to what one workgroup does, and beyond.

use rankmix::ops::{Route, Score};
use rankmix::{Graph, Result, Tensor, Value};

use crate::case::{Case, floats, floats_in, ints};
use crate::popularity::{Popularity, choose, rows};

/// The results and the gradient of the logits.
fn routed(graph: &mut Graph, v: &[Value], route: Route) -> Result<Vec<Value>> {
    let routed = graph.route_with(v[0], None, route)?;
    let gradient = graph.gradients_from(&[(routed.gates, v[1])], &v[..1])?[0];
    Ok(vec![
        routed.gates,
        routed.experts(),
        routed.segments.order(),
        routed.segments.offsets(),
        gradient,
    ])
}

fn routes(cases: &mut Vec<Case>) {
    let mut add = |name: String, logits: Tensor, route: Route| {
        let tokens = logits.shape().rows();
        let inputs = vec![logits, floats(&[tokens, route.top_k], 701)];
        let case = Case::new(name, inputs, move |g, v| routed(g, v, route));
        cases.push(case.forward_only());
    };
    for popularity in Popularity::ALL {
        for (tokens, experts, top_k) in [(7, 5, 3), (133, 17, 5), (512, 8, 2), (300, 64, 8)] {
            let logits = rows(popularity, [tokens, experts], top_k, experts);
            let name = format!("route_sorted_{tokens}_{experts}_{top_k}_{popularity:?}");
            add(name, logits, Route::new(top_k));
        }
    }
    // The most that one workgroup takes, and one more token, expert or choice.
    for (tokens, experts, top_k) in [
        (4096, 64, 8),
        (4097, 64, 8),
        (4096, 65, 2),
        (4096, 64, 9),
        (4096, 16, 9),
        (4096, 16, 10),
    ] {
        let logits = floats_in(&[tokens, experts], 700, -3.0, 3.0);
        let name = format!("route_limit_{tokens}_{experts}_{top_k}");
        let route = Route {
            renormalize: false,
            score: Score::Sigmoid,
            ..Route::new(top_k)
        };
        add(name, logits, route);
    }
    // Whole numbers: many equal logits, chosen four a pass.
    for (tokens, experts, top_k) in [(3, 9, 8), (133, 64, 7), (40, 12, 12)] {
        let logits = ints(&[tokens, experts], 702, 3);
        let logits = logits.as_i32().unwrap_or_default();
        let logits = logits.iter().map(|&logit| f64::from(logit)).collect();
        let logits = Tensor::f64([tokens, experts], logits).expect("a logit an expert");
        let name = format!("route_equal_{tokens}_{experts}_{top_k}");
        add(name, logits, Route::new(top_k));
    }
}

fn sorts(cases: &mut Vec<Case>) {
    let mut add = |name: String, keys: Tensor, limit: usize| {
        let case = Case::new(format!("sort_{name}"), vec![keys], move |g, v| {
            let sorted = g.sort_by_key(v[0], limit)?;
            Ok(vec![sorted.order, sorted.offsets])
        });
        cases.push(case.forward_only());
    };
    for (count, limit) in [
        (2, 2),
        (3, 64),
        (266, 8),
        (4000, 31),
        // The most pairs that one workgroup takes, and one more.
        (36_864, 1),
        (36_864, 8),
        (36_865, 8),
        (36_865, 30),
        (36_000, 64),
        (36_001, 64),
        (34_848, 65),
        (34_849, 65),
        (8352, 256),
        (8353, 256),
        (1, 257),
        (40_000, 4096),
        (300_000, 300),
    ] {
        add(
            format!("{count}_of_{limit}"),
            ints(&[count], 703, limit as u32),
            limit,
        );
    }
    for popularity in Popularity::ALL {
        for (tokens, top_k, experts) in [(133, 3, 7), (4096, 8, 64), (9000, 4, 64), (3000, 2, 300)]
        {
            let keys = choose(popularity, tokens, top_k, experts);
            let name = format!("{tokens}_{top_k}_of_{experts}_{popularity:?}");
            add(name, keys, experts);
        }
    }
    let same = Tensor::i32([70_000], vec![5; 70_000]).expect("70,000 keys");
    add("70000_same".to_owned(), same, 9);
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    routes(&mut cases);
    sorts(&mut cases);
    cases
}
