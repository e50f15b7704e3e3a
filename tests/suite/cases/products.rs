//! Matrix products.

use rankmix::ops::{MatMul, Product};
use rankmix::{Graph, Value};

use crate::case::{Case, floats};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [
        (1, 1, 1),
        (3, 5, 2),
        (8, 8, 8),
        (9, 12, 7),
        (16, 4, 20),
        (2, 70, 3),
    ];
    cases.extend(sums());
    cases.extend(biases());
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let options = MatMul {
            transpose_a,
            transpose_b,
            alpha: 0.75,
        };
        let dims = |m: usize, n: usize, k: usize| {
            (
                if transpose_a { [k, m] } else { [m, k] },
                if transpose_b { [n, k] } else { [k, n] },
            )
        };
        let name = format!(
            "matmul_{}{}",
            if transpose_a { "t" } else { "n" },
            if transpose_b { "t" } else { "n" }
        );
        for (m, n, k) in sizes {
            let (a, b) = dims(m, n, k);
            let inputs = vec![floats(&a, 30), floats(&b, 31), floats(&[m, n], 32)];
            cases.push(Case::new(
                format!("{name}_into_{m}_{n}_{k}"),
                inputs,
                move |g, v| {
                    let base = g.square(v[2])?;
                    Ok(vec![g.matmul_with(v[0], v[1], options, Some(base))?])
                },
            ));
        }
        for (m, n, k) in [
            (133, 70, 65),
            (128, 72, 260),
            (1, 300, 33),
            (257, 4, 64),
            // Whole tiles of every kernel.
            (128, 64, 48),
            // Few results and a long k, split every way that there is.
            (5, 7, 1030),
            (16, 24, 2048),
            (2, 16, 700),
        ] {
            let (a, b) = dims(m, n, k);
            let inputs = vec![floats(&a, 33), floats(&b, 34)];
            let build = move |g: &mut Graph, v: &[Value]| {
                Ok(vec![g.matmul_with(v[0], v[1], options, None)?])
            };
            cases.push(Case::new(format!("{name}_{m}_{n}_{k}"), inputs, build).forward_only());
        }
        let (a, b) = dims(3, 4, 5);
        let (a3, b3) = ([2, a[0], a[1]], [2, b[0], b[1]]);
        for (label, a, b) in [
            ("both", &a3[..], &b3[..]),
            ("left", &a3[..], &b[..]),
            ("right", &a[..], &b3[..]),
        ] {
            let inputs = vec![floats(a, 35), floats(b, 36)];
            cases.push(Case::new(
                format!("{name}_batched_{label}"),
                inputs,
                move |g, v| Ok(vec![g.matmul_with(v[0], v[1], options, None)?]),
            ));
        }
    }
    cases
}

/// Two products that are added, the second in every transpose: with aligned rows and without, and of more than one tile.
fn sums() -> Vec<Case> {
    let mut cases = Vec::new();
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        for (m, n, k, k2) in [(4, 8, 12, 4), (3, 5, 2, 7), (8, 4, 5, 8), (132, 72, 36, 20)] {
            let options = MatMul {
                transpose_a,
                transpose_b,
                alpha: -1.25,
            };
            let a2 = if transpose_a { [k2, m] } else { [m, k2] };
            let b2 = if transpose_b { [n, k2] } else { [k2, n] };
            let inputs = vec![
                floats(&[m, k], 33),
                floats(&[n, k], 34),
                floats(&a2, 35),
                floats(&b2, 36),
                floats(&[m, n], 37),
            ];
            let name = format!("matmul_sum_{transpose_a}_{transpose_b}_{m}_{n}_{k}_{k2}");
            let build = move |g: &mut Graph, v: &[Value]| {
                let second = Product {
                    a: v[2],
                    b: v[3],
                    options,
                };
                let y = g.matmul_sum(Product::nt(v[0], v[1]).scaled(0.5), second)?;
                let mut results = g.gradients_from(&[(y, v[4])], &v[..4])?;
                results.push(y);
                Ok(results)
            };
            cases.push(Case::new(name, inputs, build).forward_only());
        }
    }
    cases
}

/// Products with a bias, in every transpose: with aligned rows and without, of more than one tile, in batches, and with a long k.
fn biases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        for (m, n, k) in [(3, 5, 2), (8, 12, 8), (70, 36, 20), (3, 9, 600)] {
            let options = MatMul {
                transpose_a,
                transpose_b,
                alpha: 0.75,
            };
            let a = if transpose_a { [k, m] } else { [m, k] };
            let b = if transpose_b { [n, k] } else { [k, n] };
            let inputs = vec![floats(&a, 38), floats(&b, 39), floats(&[n], 40)];
            let name = format!("matmul_bias_{transpose_a}_{transpose_b}_{m}_{n}_{k}");
            let case = Case::new(name, inputs, move |g, v| {
                let [a, b] = [v[0], v[1]];
                Ok(vec![g.matmul_bias(Product { a, b, options }, v[2])?])
            });
            cases.push(if m * n * k < 1000 {
                case
            } else {
                case.forward_only()
            });
        }
    }
    let inputs = vec![
        floats(&[2, 3, 4], 41),
        floats(&[5, 4], 42),
        floats(&[5], 43),
    ];
    cases.push(Case::new("matmul_bias_batched", inputs, |g, v| {
        Ok(vec![g.matmul_bias(Product::nt(v[0], v[1]), v[2])?])
    }));
    cases
}
