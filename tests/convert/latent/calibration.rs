//! Errors weighted by what the layer sees.

use rankmix::Tensor;
use rankmix::convert::{
    Calibration, LatentOptions, SvdMethod, SvdOptions, SvdPrecision, convert_layer,
};
use rankmix::formats::LatentDown;

use crate::random::{Random, planted_experts, product, random_experts};

/// Tokens `M n` with n standard normal and the column scales of a random M falling evenly from 3 to 0.05.
fn anisotropic(seed: u64, tokens: usize, hidden: usize) -> Tensor {
    let mut random = Random::new(seed);
    let mut mixing = random.matrix(hidden, hidden);
    for (i, element) in mixing.iter_mut().enumerate() {
        let column = (i % hidden) as f64 / (hidden - 1) as f64;
        *element *= 3.0 + (0.05 - 3.0) * column;
    }
    // x^T = n^T M^T.
    let transposed: Vec<f64> = (0..hidden * hidden)
        .map(|i| mixing[(i % hidden) * hidden + i / hidden])
        .collect();
    let normal = random.matrix(tokens, hidden);
    let data = product(&normal, &transposed, [tokens, hidden, hidden]);
    Tensor::f32([tokens, hidden], data.iter().map(|&x| x as f32).collect()).expect("the shape fits")
}

/// The mean over experts of |(W_i - A_i B) X^T|² / |W_i X^T|² for gate projections, on tokens of its own.
fn output_error(
    experts: &rankmix::formats::MoeExperts,
    latent: &rankmix::formats::LatentExperts,
    tokens: &Tensor,
) -> f64 {
    let [e, _, l, m, n] = latent.extents().expect("they fit");
    let (gate, shared, own, x) = (
        experts.gate.to_f64(),
        latent.gate_latent.to_f64(),
        latent.gate_expert.to_f64(),
        tokens.to_f64(),
    );
    let count = tokens.shape().dims()[0];
    let (mut difference, mut of) = (0.0, 0.0);
    for expert in 0..e {
        let group = latent.expert_to_group[expert];
        let approximation = product(
            &own[expert * m * l..][..m * l],
            &shared[group * l * n..][..l * n],
            [m, l, n],
        );
        for token in 0..count {
            for row in 0..m {
                let weights = &gate[(expert * m + row) * n..][..n];
                let (mut right, mut found) = (0.0, 0.0);
                for column in 0..n {
                    right += weights[column] * x[token * n + column];
                    found += approximation[row * n + column] * x[token * n + column];
                }
                difference += (right - found).powi(2);
                of += right * right;
            }
        }
    }
    difference / of
}

#[test]
fn calibration_lowers_the_error_of_anisotropic_inputs_as_in_the_example() {
    const LAYERS: u64 = 40;
    let (mut plain_sum, mut aware_sum) = (0.0, 0.0);
    for seed in 0..LAYERS {
        let experts = random_experts(seed, [4, 8, 24]);
        let tokens = anisotropic(100 + seed, 4000, 24);
        let calibration = Calibration::from_activations(&tokens).expect("it is finite");
        let options = LatentOptions::new(1, 8);
        let (plain, _) = convert_layer(&experts, None, &options).expect("it converts");
        let (aware, report) =
            convert_layer(&experts, Some(&calibration), &options).expect("it converts");
        let square = output_error(&experts, &aware, &tokens);
        let measured = square.sqrt();
        plain_sum += output_error(&experts, &plain, &tokens);
        aware_sum += square;
        let gate = report.operators[0].errors.whole;
        let reported = gate.weighted.expect("there is a calibration");
        assert!(
            (reported - measured).abs() < 1e-3,
            "{reported} is not {measured}"
        );
        assert_eq!(report.calibration_tokens, Some(4000));
        assert!((1.0 - reported * reported - report.operators[0].kept_energy).abs() < 1e-4);
    }
    let (plain, aware) = (plain_sum / LAYERS as f64, aware_sum / LAYERS as f64);
    // The example: squares of 0.33 and 0.09 for one such layer.
    assert!((plain - 0.33).abs() < 0.04, "{plain}");
    assert!((aware - 0.09).abs() < 0.02, "{aware}");
}

#[test]
fn a_singular_calibration_converts_and_keeps_other_inputs_alive() {
    // Three tokens for 24 hidden numbers, one of which is 0 always.
    let mut random = Random::new(7);
    let data: Vec<f32> = (0..3 * 24)
        .map(|i| {
            if i % 24 == 5 {
                0.0
            } else {
                random.next() as f32
            }
        })
        .collect();
    let tokens = Tensor::f32([3, 24], data).expect("the shape fits");
    let calibration = Calibration::from_activations(&tokens).expect("it is finite");
    let experts = random_experts(8, [4, 8, 24]);
    let (latent, report) = convert_layer(&experts, Some(&calibration), &LatentOptions::new(1, 8))
        .expect("it converts");
    assert!(output_error(&experts, &latent, &tokens) < 1e-6);
    let whole = report.errors.whole;
    assert!(
        whole.weighted.expect("there is a calibration") < 2e-3,
        "{whole:?}"
    );
    // Five dimensions are left over for what the tokens do not show: not as good as all eight, but far from nothing.
    assert!(whole.unweighted < 0.9, "{whole:?}");
}

/// Tokens whose numbers fall evenly, on a logarithmic scale, from 1 to `smallest`: second moments of the condition `smallest`^-2, or none at all where they are fewer than
/// the numbers.
fn falling(seed: u64, tokens: usize, hidden: usize, smallest: f64) -> Tensor {
    let mut random = Random::new(seed);
    let data = (0..tokens * hidden)
        .map(|i| {
            let place = (i % hidden) as f64 / (hidden - 1) as f64;
            (random.next() * smallest.powf(place)) as f32
        })
        .collect();
    Tensor::f32([tokens, hidden], data).expect("the shape fits")
}

#[test]
fn thirty_two_bits_do_as_well_as_sixty_four_on_ill_conditioned_calibrations() {
    let random = random_experts(21, [4, 8, 24]);
    let planted = planted_experts(22, [4, 8, 24], &[0; 4], 8);
    for (tokens, smallest) in [
        (4000, 1e-4),
        (4000, 1e-6),
        (4000, 1e-12),
        (3, 1.0),
        (3, 1e-4),
    ] {
        let tokens = falling(23, tokens, 24, smallest);
        let calibration = Calibration::from_activations(&tokens).expect("it is finite");
        for (experts, is_exact) in [(&random, false), (&planted, true)] {
            for method in [
                SvdMethod::Exact,
                SvdMethod::Randomized {
                    oversampling: 8,
                    power_iterations: 2,
                    seed: 0,
                },
            ] {
                let errors = [SvdPrecision::F64, SvdPrecision::F32].map(|precision| {
                    let options = LatentOptions {
                        factored_down: true,
                        svd: SvdOptions { precision, method },
                        ..LatentOptions::new(1, 8)
                    };
                    let (latent, report) =
                        convert_layer(experts, Some(&calibration), &options).expect("it converts");
                    let whole = report.errors.whole;
                    [
                        whole.unweighted,
                        whole.weighted.expect("there is a calibration"),
                        output_error(experts, &latent, &tokens).sqrt(),
                    ]
                });
                let [wide, narrow] = errors;
                for (wide, narrow) in wide.into_iter().zip(narrow) {
                    assert!(
                        narrow <= 1.01 * wide + 1e-4,
                        "moments of {smallest}, {method:?}: {errors:?}"
                    );
                }
                assert!(
                    narrow[1] <= 1.0001 * wide[1] + 5e-6,
                    "{smallest}: {errors:?}"
                );
                assert!(!is_exact || wide.into_iter().all(|error| error < 1e-6));
            }
        }
    }
}

#[test]
fn what_is_exact_without_calibration_is_exact_with_it() {
    let experts = planted_experts(9, [6, 10, 24], &[0, 0, 0, 1, 1, 1], 7);
    let calibration =
        Calibration::from_activations(&anisotropic(10, 500, 24)).expect("it is finite");
    let options = LatentOptions {
        factored_down: true,
        ..LatentOptions::new(2, 7)
    };
    let (_, report) = convert_layer(&experts, Some(&calibration), &options).expect("it converts");
    for operator in &report.operators {
        assert!(operator.errors.whole.unweighted <= 1e-5, "{operator:?}");
        let weighted = operator
            .errors
            .whole
            .weighted
            .expect("there is a calibration");
        assert!(weighted <= 1e-5, "{operator:?}");
    }
}

#[test]
fn factored_down_projections_are_weighted_by_what_the_experts_have_inside() {
    let experts = random_experts(11, [4, 8, 24]);
    let tokens = anisotropic(12, 300, 24);
    let calibration = Calibration::from_activations(&tokens).expect("it is finite");
    let options = LatentOptions {
        factored_down: true,
        ..LatentOptions::new(1, 8)
    };
    // |(Wd - Bd Ad) h|² over all tokens and experts, by |Wd h|².
    let measured = |latent: &rankmix::formats::LatentExperts| {
        let LatentDown::Factored {
            latent: shared,
            expert: own,
        } = &latent.down
        else {
            panic!("the down projections are to be factored");
        };
        let (shared, own) = (shared.to_f64(), own.to_f64());
        let (gate, up, down) = (
            experts.gate.to_f64(),
            experts.up.to_f64(),
            experts.down.to_f64(),
        );
        let x = tokens.to_f64();
        let (mut difference, mut of) = (0.0, 0.0);
        for expert in 0..4 {
            let approximation = product(&shared, &own[expert * 64..][..64], [24, 8, 8]);
            for token in x.chunks(24) {
                let project = |weights: &[f64], row: usize| -> f64 {
                    weights[(expert * 8 + row) * 24..][..24]
                        .iter()
                        .zip(token)
                        .map(|(w, x)| w * x)
                        .sum()
                };
                let h: Vec<f64> = (0..8)
                    .map(|row| {
                        let gate = project(&gate, row);
                        gate / (1.0 + (-gate).exp()) * project(&up, row)
                    })
                    .collect();
                for row in 0..24 {
                    let right: f64 = (0..8)
                        .map(|k| down[(expert * 24 + row) * 8 + k] * h[k])
                        .sum();
                    let found: f64 = (0..8).map(|k| approximation[row * 8 + k] * h[k]).sum();
                    difference += (right - found).powi(2);
                    of += right * right;
                }
            }
        }
        (difference / of).sqrt()
    };
    let (plain, _) = convert_layer(&experts, None, &options).expect("it converts");
    let (aware, report) =
        convert_layer(&experts, Some(&calibration), &options).expect("it converts");
    let (plain, aware) = (measured(&plain), measured(&aware));
    let reported = report.operators[2]
        .errors
        .whole
        .weighted
        .expect("there is a calibration");
    assert!((reported - aware).abs() < 1e-3, "{reported} is not {aware}");
    assert!(aware < 0.95 * plain, "{aware} against {plain}");
}

#[test]
fn threads_do_not_change_a_bit() {
    let experts = random_experts(8, [8, 24, 40]);
    let tokens = anisotropic(3, 300, 40);
    let options = LatentOptions {
        factored_down: true,
        group_by: rankmix::convert::GroupBy::Similarity,
        rank: Some(15),
        ..LatentOptions::new(4, 10)
    };
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let (latent, report) = pool.expect("threads start").install(|| {
            let calibration = Calibration::from_activations(&tokens).expect("it is sound");
            convert_layer(&experts, Some(&calibration), &options).expect("it converts")
        });
        let LatentDown::Factored {
            latent: down,
            expert,
        } = latent.down
        else {
            panic!("the down projections are factored");
        };
        let parts = [
            latent.gate_latent,
            latent.gate_expert,
            latent.up_latent,
            latent.up_expert,
            down,
            expert,
        ];
        let bits: Vec<u32> = parts
            .iter()
            .flat_map(|part| part.to_f32().into_iter().map(f32::to_bits))
            .collect();
        (bits, report)
    };
    assert!(with(1) == with(5));
}
