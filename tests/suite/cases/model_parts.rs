//! Activations, norms, embeddings, losses.

use rankmix::Tensor;

use crate::case::{Case, floats, floats_in, ints};

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("silu", vec![floats_in(&[3, 7], 80, -4.0, 4.0)], |g, v| {
            Ok(vec![g.silu(v[0])?])
        }),
        Case::new(
            "silu_extreme",
            vec![floats_in(&[133], 81, -1e4, 1e4)],
            |g, v| {
                let y = g.silu(v[0])?;
                let dx = g.gradients_from(&[(y, v[0])], &[v[0]])?;
                Ok(vec![y, dx[0]])
            },
        )
        .forward_only(),
        Case::new(
            "gradient_norm",
            vec![floats(&[9000], 82), floats(&[3, 5], 83)],
            |g, v| Ok(vec![g.gradient_norm(v, 2.5)?]),
        )
        .forward_only(),
        Case::new("gradient_norm_small", vec![floats(&[3], 84)], |g, v| {
            Ok(vec![g.gradient_norm(v, 100.0)?])
        })
        .forward_only(),
    ];
    for (rows, n) in [(1, 1), (3, 5), (2, 12), (7, 3)] {
        cases.push(Case::new(
            format!("rms_norm_{rows}_{n}"),
            vec![floats(&[rows, n], 85), floats(&[n], 86)],
            |g, v| Ok(vec![g.rms_norm(v[0], v[1], 1e-3)?]),
        ));
    }
    for (rows, n) in [(133, 70), (3, 4096), (500, 33), (133, 72), (64, 4096)] {
        let inputs = vec![
            floats(&[rows, n], 87),
            floats(&[n], 88),
            floats(&[rows, n], 89),
        ];
        cases.push(
            Case::new(format!("rms_norm_{rows}_{n}"), inputs, |g, v| {
                let y = g.rms_norm(v[0], v[1], 1e-5)?;
                let mut results = g.gradients_from(&[(y, v[2])], &v[..2])?;
                results.push(y);
                Ok(results)
            })
            .forward_only(),
        );
    }
    for (count, rows, width) in [(1, 1, 1), (5, 3, 4), (12, 7, 2), (2, 300, 3)] {
        let inputs = vec![floats(&[rows, width], 90), ints(&[count], 91, rows as u32)];
        cases.push(Case::new(
            format!("embedding_{count}_{rows}_{width}"),
            inputs,
            |g, v| Ok(vec![g.embedding(v[0], v[1])?]),
        ));
    }
    let inputs = vec![
        floats(&[700, 33], 92),
        ints(&[40, 25], 93, 700),
        floats(&[40, 25, 33], 94),
    ];
    cases.push(
        Case::new("embedding_large", inputs, |g, v| {
            let y = g.embedding(v[0], v[1])?;
            let dx = g.gradients_from(&[(y, v[2])], &v[..1])?;
            Ok(vec![y, dx[0]])
        })
        .forward_only(),
    );
    let with_ignored = |rows: usize, classes: usize| {
        let labels = ints(&[rows], 95, classes as u32);
        let some = labels.as_i32().unwrap_or_default().iter().enumerate();
        let labels = some
            .map(|(row, &label)| if row % 3 == 1 { -100 } else { label })
            .collect();
        Tensor::i32([rows], labels).expect("one label a row")
    };
    for (rows, classes) in [(1, 1), (4, 5), (7, 3)] {
        let inputs = vec![
            floats_in(&[rows, classes], 96, -3.0, 3.0),
            with_ignored(rows, classes),
        ];
        cases.push(Case::new(
            format!("cross_entropy_{rows}_{classes}"),
            inputs,
            |g, v| Ok(vec![g.cross_entropy(v[0], v[1])?]),
        ));
    }
    for (rows, classes) in [(133, 257), (3, 49_152), (1000, 8)] {
        let inputs = vec![
            floats_in(&[rows, classes], 97, -8.0, 8.0),
            with_ignored(rows, classes),
        ];
        cases.push(
            Case::new(format!("cross_entropy_{rows}_{classes}"), inputs, |g, v| {
                let loss = g.cross_entropy(v[0], v[1])?;
                let dx = g.gradients(loss, &v[..1])?;
                Ok(vec![loss, dx[0]])
            })
            .forward_only(),
        );
    }
    let none = Tensor::i32([3], vec![-100; 3]).expect("3 labels");
    cases.push(
        Case::new(
            "cross_entropy_all_ignored",
            vec![floats(&[3, 4], 98), none],
            |g, v| {
                let loss = g.cross_entropy(v[0], v[1])?;
                let dx = g.gradients(loss, &v[..1])?;
                Ok(vec![loss, dx[0]])
            },
        )
        .forward_only(),
    );
    for (tokens, experts, top_k) in [(1, 1, 1), (5, 4, 2), (3, 6, 3), (133, 64, 8), (1000, 7, 2)] {
        let chosen = (0..tokens * top_k)
            .map(|i| ((i / top_k * 3 + i % top_k) % experts) as i32)
            .collect();
        let chosen = Tensor::i32([tokens, top_k], chosen).expect("top_k experts a token");
        let inputs = vec![floats_in(&[tokens, experts], 99, -2.0, 2.0), chosen];
        let case = Case::new(
            format!("router_losses_{tokens}_{experts}_{top_k}"),
            inputs,
            |g, v| {
                let balance = g.balance_loss(v[0], v[1])?;
                let z = g.z_loss(v[0])?;
                let both = g.add(balance.loss, z)?;
                let dx = g.gradients(both, &v[..1])?;
                Ok(vec![balance.loss, balance.load, z, dx[0]])
            },
        );
        cases.push(case.forward_only());
        if tokens <= 5 {
            let chosen = (0..tokens * top_k)
                .map(|i| ((i / top_k * 3 + i % top_k) % experts) as i32)
                .collect();
            let chosen = Tensor::i32([tokens, top_k], chosen).expect("top_k experts a token");
            let inputs = vec![floats_in(&[tokens, experts], 100, -2.0, 2.0), chosen];
            cases.push(Case::new(
                format!("balance_loss_{tokens}_{experts}_{top_k}"),
                inputs.clone(),
                |g, v| Ok(vec![g.balance_loss(v[0], v[1])?.loss]),
            ));
            cases.push(Case::new(
                format!("z_loss_{tokens}_{experts}"),
                inputs[..1].to_vec(),
                |g, v| Ok(vec![g.z_loss(v[0])?]),
            ));
        }
    }
    cases
}
