//! Element-wise arithmetic, broadcasting, sums.

use rankmix::ops::{Activation, CopyForm, MultiplyAdds};
use rankmix::{Init, Tensor};

use crate::case::{Case, floats, floats_in};

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("affine", vec![floats(&[3, 5], 1)], |g, v| {
            Ok(vec![g.affine(v[0], -1.5, 0.25)?])
        }),
        Case::new("copy", vec![floats(&[5, 7], 27)], |g, v| {
            let copy = g.copy(v[0])?;
            Ok(vec![g.square(copy)?])
        }),
        Case::new("square", vec![floats(&[7], 2)], |g, v| {
            Ok(vec![g.square(v[0])?])
        }),
        Case::new("sqrt", vec![floats_in(&[2, 9], 3, 0.5, 2.0)], |g, v| {
            Ok(vec![g.sqrt(v[0])?])
        }),
        Case::new(
            "reciprocal",
            vec![floats_in(&[4, 4], 4, 0.5, 2.0)],
            |g, v| Ok(vec![g.reciprocal(v[0])?]),
        ),
        Case::new("exp", vec![floats(&[133], 5)], |g, v| {
            Ok(vec![g.exp(v[0])?])
        }),
        Case::new("ln", vec![floats_in(&[3, 3], 6, 0.5, 2.0)], |g, v| {
            Ok(vec![g.ln(v[0])?])
        }),
        Case::new("tanh", vec![floats_in(&[133], 24, -4.0, 4.0)], |g, v| {
            Ok(vec![g.tanh(v[0])?])
        }),
        Case::new(
            "tanh_slope",
            vec![floats_in(&[3, 9], 25, -4.0, 4.0)],
            |g, v| {
                let y = g.tanh(v[0])?;
                let ones = g.constant(Tensor::f32([3, 9], vec![1.0; 27])?)?;
                g.gradients_from(&[(y, ones)], v)
            },
        ),
        Case::new(
            "tanh_where_it_is_nearly_1",
            vec![floats_in(&[70], 26, 4.0, 9.0)],
            |g, v| {
                let y = g.tanh(v[0])?;
                // By the size of the derivative, so that its digits count.
                let ones = g.constant(Tensor::f32([70], vec![1.0; 70])?)?;
                let slope = g.gradients_from(&[(y, ones)], v)?[0];
                Ok(vec![g.ln(slope)?])
            },
        ),
        Case::new("reshape", vec![floats(&[3, 8], 7)], |g, v| {
            let square = g.square(v[0])?;
            Ok(vec![g.reshape(square, [4, 6])?])
        }),
        Case::new(
            "accumulate_used_twice",
            vec![floats(&[5, 3], 8), floats(&[5, 3], 9)],
            |g, v| {
                // The first operand is used again after it was added into: the planner must copy it.
                let first = g.square(v[0])?;
                let sum = g.accumulate(first, v[1])?;
                Ok(vec![sum, g.scale(first, 3.0)?])
            },
        ),
        Case::new(
            "accumulate_onto_a_constant",
            vec![floats(&[5], 22)],
            |g, v| {
                // The planner must copy what it may not write over.
                let base = g.constant(floats(&[5], 23))?;
                let sum = g.accumulate(base, v[0])?;
                Ok(vec![sum, g.mul(base, v[0])?])
            },
        ),
        Case::new(
            "accumulate_scaled",
            vec![floats(&[7, 3], 27), floats(&[7, 3], 28)],
            |g, v| {
                let square = g.square(v[0])?;
                let sum = g.accumulate_scaled(square, v[1], -1.0 / 3.0)?;
                // The addend has a gradient from elsewhere as well.
                Ok(vec![sum, g.mul(v[1], v[1])?])
            },
        ),
        Case::new("accumulate_into", vec![floats(&[7, 3], 29)], |g, v| {
            // Twice, and used: each update must be read as the newest state. Cleared at the end, so that a rerun starts the same.
            let p = g.parameter("p", [7, 3], Init::Zeros, false)?;
            let once = g.accumulate_into(p, v[0], 0.5)?;
            let square = g.square(once)?;
            let twice = g.accumulate_into(once, square, -2.0)?;
            let y = g.scale(twice, 3.0)?;
            Ok(vec![g.clear(twice)?, y])
        })
        .forward_only(),
        Case::new("clear", vec![], |g, _| {
            let p = g.parameter("p", [71, 5], Init::Ones, false)?;
            Ok(vec![g.clear(p)?])
        })
        .forward_only(),
        Case::new("accumulate_itself", vec![floats(&[6], 10)], |g, v| {
            let square = g.square(v[0])?;
            Ok(vec![g.accumulate(square, square)?])
        }),
        Case::new(
            "recomputed",
            vec![floats(&[5, 3], 24), floats_in(&[3], 25, 0.5, 1.5)],
            |g, v| {
                // One value leaves the segment beside the last; the inner segment is recomputed twice.
                let (root, y) = g.recompute(|g| {
                    let square = g.square(v[0])?;
                    let shifted = g.affine(square, 0.5, 1.0)?;
                    let root = g.sqrt(shifted)?;
                    let inner = g.recompute(|g| {
                        let product = g.mul(root, v[1])?;
                        let exp = g.exp(product)?;
                        g.mul(exp, product)
                    })?;
                    // Both operands are accumulated into and used again.
                    let sum = g.accumulate(inner, shifted)?;
                    Ok((root, g.mul(sum, inner)?))
                })?;
                let twice = g.mul(y, root)?;
                Ok(vec![y, twice])
            },
        ),
        Case::new("sum_all", vec![floats(&[11, 3, 2], 11)], |g, v| {
            Ok(vec![g.sum_all(v[0])?])
        }),
        Case::new("mean_all", vec![floats(&[13], 12)], |g, v| {
            Ok(vec![g.mean_all(v[0])?])
        }),
        Case::new("sum_inner", vec![floats(&[7, 133], 13)], |g, v| {
            Ok(vec![g.sum(v[0], &[1])?])
        }),
        Case::new("sum_outer", vec![floats(&[70, 5], 14)], |g, v| {
            Ok(vec![g.sum(v[0], &[0])?])
        }),
        Case::new(
            "sum_first_and_last",
            vec![floats(&[4, 3, 5], 15)],
            |g, v| Ok(vec![g.sum(v[0], &[0, 2])?]),
        ),
        Case::new("sum_two_passes", vec![floats(&[9001, 2], 16)], |g, v| {
            Ok(vec![g.sum(v[0], &[0])?])
        })
        .forward_only(),
    ];
    // One invocation a sum, or four sums; in chunks that are cut off, and in passes over passes.
    for (dims, axis) in [
        (&[65, 12][..], 1),
        (&[64, 4100], 1),
        (&[66_564], 0),
        (&[3, 133, 8], 1),
        (&[130, 64], 0),
        (&[4200, 4], 0),
    ] {
        let name = format!("sum_{dims:?}_{axis}");
        let build = move |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
            let y = g.sum(v[0], &[axis])?;
            let mut results = g.gradients_from(&[(y, y)], &v[..1])?;
            results.push(y);
            Ok(results)
        };
        cases.push(Case::new(name, vec![floats(dims, 17)], build).forward_only());
    }
    // More than a workgroup's elements, several an invocation, and an end that fills neither.
    let many = floats(&[4203], 18);
    let build = |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
        let x = g.affine(v[0], 0.5, 0.25)?;
        let y = g.mul(x, v[1])?;
        let y = g.silu(y)?;
        let y = g.activate(Activation::Gelu, y, Some(v[1]))?;
        let y = g.copy(y)?;
        let y = g.accumulate_scaled(y, v[0], 0.5)?;
        let mut results = g.gradients_from(&[(y, v[0])], v)?;
        results.push(y);
        Ok(results)
    };
    let inputs = vec![many, floats(&[4203], 19)];
    cases.push(Case::new("element_wise_4203", inputs, build).forward_only());
    for form in CopyForm::ALL {
        let name = format!("copy_{}_{}", form.workgroup, form.quads);
        let build = move |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
            Ok(vec![g.copy_in_form(v[0], form)?])
        };
        cases.push(Case::new(name, vec![floats(&[4203], 20)], build).forward_only());
    }
    for chains in [1, 3, MultiplyAdds::MAX_CHAINS] {
        for fused in [false, true] {
            let name = format!("multiply_adds_{chains}_{fused}");
            // One turn leaves a sixteenth of what went in.
            let options = MultiplyAdds {
                chains,
                turns: 1,
                fused,
            };
            let build = move |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
                Ok(vec![g.multiply_adds(v[0], options)?])
            };
            cases.push(Case::new(name, vec![floats(&[9, 31], 28)], build).forward_only());
        }
    }
    let shapes: [(&[usize], &[usize]); 6] = [
        (&[3, 4], &[3, 4]),
        (&[3, 4], &[4]),
        (&[5, 1], &[1, 7]),
        (&[2, 3, 5], &[3, 1]),
        (&[], &[2, 2]),
        (&[2, 1, 3, 1], &[4, 1, 6]),
    ];
    for (a, b) in shapes {
        let inputs = || vec![floats(a, 20), floats_in(b, 21, 0.5, 2.0)];
        cases.push(Case::new(format!("add_{a:?}_{b:?}"), inputs(), |g, v| {
            Ok(vec![g.add(v[0], v[1])?])
        }));
        cases.push(Case::new(format!("sub_{a:?}_{b:?}"), inputs(), |g, v| {
            Ok(vec![g.sub(v[0], v[1])?])
        }));
        cases.push(Case::new(format!("mul_{a:?}_{b:?}"), inputs(), |g, v| {
            Ok(vec![g.mul(v[0], v[1])?])
        }));
        cases.push(Case::new(format!("div_{a:?}_{b:?}"), inputs(), |g, v| {
            Ok(vec![g.div(v[0], v[1])?])
        }));
    }
    cases
}
