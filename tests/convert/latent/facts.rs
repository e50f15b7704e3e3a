//! What the singular vectors promise.

use faer::Mat;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rankmix::convert::{
    LatentOptions, Operator, SvdMethod, SvdOptions, SvdPrecision, convert_layer,
};
use rankmix::formats::{LatentDown, MoeExperts};

use crate::random::{in_threads, planted_experts, random_experts};

const RANDOMIZED: SvdMethod = SvdMethod::Randomized {
    oversampling: 8,
    power_iterations: 3,
    seed: 5,
};

/// The singular values of the stack of some experts' Wg, Wu or Wd^T, by faer's own decomposition of the stack itself.
fn singular_values(experts: &MoeExperts, operator: Operator, members: &[usize]) -> Vec<f64> {
    let [_, m, n] = experts.extents().expect("they fit");
    let (tensor, transposed) = match operator {
        Operator::Gate => (&experts.gate, false),
        Operator::Up => (&experts.up, false),
        Operator::Down => (&experts.down, true),
    };
    let data = tensor.to_f64();
    Mat::from_fn(members.len() * m, n, |row, column| {
        let (expert, row) = (members[row / m], row % m);
        let inside = if transposed {
            column * m + row
        } else {
            row * n + column
        };
        data[expert * m * n + inside]
    })
    .singular_values()
    .expect("they converge")
}

/// The relative error that is left beyond `latent` singular values.
fn discarded(values: &[f64], latent: usize) -> f64 {
    let squares = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
    (squares(&values[latent..]) / squares(values)).sqrt()
}

fn factored(groups: usize, latent: usize) -> LatentOptions {
    LatentOptions {
        factored_down: true,
        ..LatentOptions::new(groups, latent)
    }
}

#[test]
fn a_planted_shared_subspace_is_recovered_at_its_width() {
    let group_of = [0, 0, 0, 1, 1, 1];
    let experts = planted_experts(1, [6, 10, 24], &group_of, 7);
    for method in [SvdMethod::Exact, RANDOMIZED] {
        let options = LatentOptions {
            svd: SvdOptions {
                method,
                ..SvdOptions::default()
            },
            ..factored(2, 7)
        };
        let (_, report) = convert_layer(&experts, None, &options).expect("it converts");
        assert_eq!(report.operators.len(), 6);
        for operator in &report.operators {
            assert!(operator.errors.whole.unweighted <= 1e-5, "{operator:?}");
            assert!((operator.kept_energy - 1.0).abs() < 1e-9, "{operator:?}");
        }
    }
}

#[test]
fn below_the_planted_width_the_error_is_what_the_singular_values_discard() {
    let group_of = [0, 0, 0, 1, 1, 1];
    let experts = planted_experts(2, [6, 10, 24], &group_of, 9);
    for latent in [1, 4, 8] {
        let (_, report) = convert_layer(&experts, None, &factored(2, latent)).expect("it converts");
        for operator in &report.operators {
            let members: Vec<usize> = (0..6).filter(|&e| group_of[e] == operator.group).collect();
            let values = singular_values(&experts, operator.operator, &members);
            let expected = discarded(&values, latent);
            let found = operator.errors.whole.unweighted;
            assert!(
                (found - expected).abs() <= 1e-4 * expected,
                "{found} is not {expected}"
            );
            let kept = 1.0 - expected * expected;
            assert!((operator.kept_energy - kept).abs() < 1e-6, "{operator:?}");
        }
    }
}

#[test]
fn the_factors_that_are_returned_have_the_error_that_is_reported() {
    let experts = random_experts(3, [4, 6, 20]);
    let (latent, report) = convert_layer(&experts, None, &factored(2, 5)).expect("it converts");
    let [e, g, l, m, n] = latent.extents().expect("they fit");
    assert_eq!([e, g, l, m, n], [4, 2, 5, 6, 20]);
    let (gate, shared, own) = (
        experts.gate.to_f64(),
        latent.gate_latent.to_f64(),
        latent.gate_expert.to_f64(),
    );
    let LatentDown::Factored {
        latent: down_shared,
        expert: down_own,
    } = &latent.down
    else {
        panic!("the down projections are to be factored");
    };
    let (down, down_shared, down_own) = (
        experts.down.to_f64(),
        down_shared.to_f64(),
        down_own.to_f64(),
    );
    let mut squares = [[0.0; 2]; 2];
    for expert in 0..e {
        let group = latent.expert_to_group[expert];
        for row in 0..m {
            for column in 0..n {
                let approximation: f64 = (0..l)
                    .map(|k| own[(expert * m + row) * l + k] * shared[(group * l + k) * n + column])
                    .sum();
                let weight = gate[(expert * m + row) * n + column];
                squares[0][0] += (weight - approximation).powi(2);
                squares[0][1] += weight * weight;
                let approximation: f64 = (0..l)
                    .map(|k| {
                        down_shared[(group * n + column) * l + k]
                            * down_own[(expert * l + k) * m + row]
                    })
                    .sum();
                let weight = down[(expert * n + column) * m + row];
                squares[1][0] += (weight - approximation).powi(2);
                squares[1][1] += weight * weight;
            }
        }
    }
    for (operator, [difference, of]) in [Operator::Gate, Operator::Down].into_iter().zip(squares) {
        let found: Vec<_> = report
            .operators
            .iter()
            .filter(|o| o.operator == operator)
            .collect();
        let values: Vec<f64> = found.iter().map(|o| o.errors.whole.unweighted).collect();
        let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = values.iter().copied().fold(0.0, f64::max);
        let here = (difference / of).sqrt();
        assert!(
            (lowest..=highest).contains(&here),
            "{here} is not within {values:?}"
        );
        assert!(lowest > 0.1);
    }
}

/// The mean of the squared relative errors over many layers of the example's size: 4 experts of 8 x 24 in one group, latents of 8.
fn mean_squares(rank: Option<usize>) -> [f64; 2] {
    const LAYERS: u64 = 200;
    let mut sums = [0.0; 2];
    for seed in 0..LAYERS {
        let experts = random_experts(1000 + seed, [4, 8, 24]);
        let options = LatentOptions {
            rank,
            ..LatentOptions::new(1, 8)
        };
        let (_, report) = convert_layer(&experts, None, &options).expect("it converts");
        sums[0] += report.errors.without_refit.unweighted.powi(2);
        sums[1] += report.errors.whole.unweighted.powi(2);
    }
    sums.map(|sum| sum / LAYERS as f64)
}

#[test]
fn truncation_before_costs_what_the_example_says_and_refitting_wins_most_of_it_back() {
    let plain = mean_squares(None);
    assert!((plain[1] - 0.315).abs() < 0.02, "{plain:?}");
    assert_eq!(plain[0], plain[1]);
    let mut last = plain;
    for (rank, expected) in [
        (6, [0.346, 0.319]),
        (4, [0.408, 0.335]),
        (3, [0.453, 0.347]),
        (2, [0.531, 0.376]),
    ] {
        let found = mean_squares(Some(rank));
        for (found, expected) in found.into_iter().zip(expected) {
            assert!(
                (found - expected).abs() < 0.02,
                "rank {rank}: {found} is not {expected}"
            );
        }
        assert!(found[1] < found[0] && found[0] > last[0] && found[1] > last[1]);
        last = found;
    }
}

#[test]
fn the_phases_of_a_truncation_are_reported_apart() {
    let experts = random_experts(4, [4, 8, 24]);
    let with = |rank| LatentOptions {
        rank: Some(rank),
        ..LatentOptions::new(2, 8)
    };
    let (_, full) = convert_layer(&experts, None, &with(8)).expect("it converts");
    let (_, plain) = convert_layer(&experts, None, &LatentOptions::new(2, 8)).expect("it converts");
    assert!(full.errors.rank.unweighted < 1e-6);
    assert!((full.errors.whole.unweighted - plain.errors.whole.unweighted).abs() < 1e-6);
    let options = LatentOptions {
        rank: Some(3),
        ..LatentOptions::new(2, 6)
    };
    let (_, cut) = convert_layer(&experts, None, &options).expect("it converts");
    // Rank 3 of 8: by Eckart and Young's theorem what the singular values of each expert discard.
    let mut squares = [0.0; 2];
    for operator in [Operator::Gate, Operator::Up] {
        for expert in 0..4 {
            let values = singular_values(&experts, operator, &[expert]);
            squares[0] += values[3..].iter().map(|s| s * s).sum::<f64>();
            squares[1] += values.iter().map(|s| s * s).sum::<f64>();
        }
    }
    let expected = (squares[0] / squares[1]).sqrt();
    assert!((cut.errors.rank.unweighted - expected).abs() < 1e-5);
    // Two experts of rank 3 each have a stack of rank 6 at most: the second phase adds nothing to it.
    assert!(cut.errors.factorisation.unweighted < 1e-6);
}

#[test]
fn the_published_models_lose_the_published_part_of_their_experts() {
    // E, m, n, G and the reduction in tenths of a percent.
    for (dims, tenths) in [
        ([64_u64, 1408, 2048, 8], 125),
        ([128, 768, 2048, 32], 250),
        ([128, 1536, 4096, 32], 250),
        ([256, 2048, 7168, 64], 310),
        ([384, 2048, 7168, 128], 254),
    ] {
        // A sixty-fourth, a hundred and twenty-eighth of every width has the same reduction; the counts come from a report.
        let [e, m, n, g] = dims.map(|x| x as usize);
        let (m, n) = (m / 128, n / 128);
        let experts = random_experts(5, [e, m, n]);
        let (latent, report) =
            convert_layer(&experts, None, &LatentOptions::new(g, m)).expect("it converts");
        let elements = |tensors: &[&rankmix::Tensor]| {
            tensors
                .iter()
                .map(|t| t.shape().elements() as u64)
                .sum::<u64>()
        };
        let LatentDown::Whole(down) = &latent.down else {
            panic!("the down projections are to stay whole");
        };
        let after = elements(&[
            &latent.gate_latent,
            &latent.up_latent,
            &latent.gate_expert,
            &latent.up_expert,
            down,
        ]);
        let before = elements(&[&experts.gate, &experts.up, &experts.down]);
        assert_eq!(
            (report.parameters.before, report.parameters.after),
            (before, after)
        );
        let reduction = 1000.0 * (1.0 - after as f64 / before as f64);
        assert_eq!(reduction.round() as u64, tenths, "{reduction} for {dims:?}");
        assert!(report.warnings.is_empty());
    }
}

#[test]
fn a_layer_that_becomes_dearer_is_warned_of() {
    let experts = random_experts(6, [8, 16, 16]);
    // Every expert its own group: 3 m n + 2 l n more than before.
    let (_, report) =
        convert_layer(&experts, None, &LatentOptions::new(8, 16)).expect("it converts");
    assert!(report.parameters.after > report.parameters.before);
    let report = report.with_top_k(2);
    assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
    let active = report.active.expect("it was asked for");
    assert_eq!(active.flops_before, 6 * 2 * 16 * 16);
    // 2 k m n + 4 k m l + 4 k l n: 10 in place of 6.
    assert_eq!(active.flops_after_most, 10 * 2 * 16 * 16);
    assert!((active.expected_change - 2.0 / 3.0).abs() < 1e-12);

    let experts = random_experts(7, [8, 4, 16]);
    let (_, report) =
        convert_layer(&experts, None, &LatentOptions::new(2, 4)).expect("it converts");
    let active = report.with_top_k(3).active.expect("it was asked for");
    // 3 of 8 in two groups of 4: both unless all three are in one, 8 of 56.
    assert!((active.expected_active_groups - (2.0 - 8.0 / 56.0)).abs() < 1e-12);
    assert_eq!(
        active.flops_after_least,
        2 * 3 * 4 * 16 + 4 * 3 * 4 * 4 + 4 * 4 * 16
    );
}

fn bits(experts: &rankmix::formats::LatentExperts) -> Vec<u32> {
    let mut tensors = vec![
        &experts.gate_latent,
        &experts.up_latent,
        &experts.gate_expert,
        &experts.up_expert,
    ];
    match &experts.down {
        LatentDown::Whole(down) => tensors.push(down),
        LatentDown::Factored { latent, expert } => tensors.extend([latent, expert]),
    }
    tensors
        .into_iter()
        .flat_map(rankmix::Tensor::to_f32)
        .map(f32::to_bits)
        .collect()
}

#[test]
fn threads_do_not_change_a_bit() {
    let experts = random_experts(8, [8, 12, 40]);
    for (precision, method) in [
        (SvdPrecision::F64, SvdMethod::Exact),
        (SvdPrecision::F32, SvdMethod::Exact),
        (SvdPrecision::F64, RANDOMIZED),
    ] {
        let options = LatentOptions {
            svd: SvdOptions { precision, method },
            group_by: rankmix::convert::GroupBy::Similarity,
            rank: Some(9),
            ..factored(4, 10)
        };
        let with = |threads| {
            in_threads(threads, || convert_layer(&experts, None, &options)).expect("it converts")
        };
        let (one, report_of_one) = with(1);
        let (five, report_of_five) = with(5);
        assert_eq!(bits(&one), bits(&five));
        assert_eq!(report_of_one, report_of_five);
    }
}

#[test]
fn random_directions_come_close_to_all_singular_vectors() {
    // Singular values that fall by half: what real weights have is flatter, and what random ones have flatter still.
    let mut experts = random_experts(9, [4, 30, 50]);
    let fall = |tensor: &rankmix::Tensor| {
        let data = tensor.to_f64();
        let data: Vec<f64> = (0..data.len())
            .map(|i| data[i] * (-((i % 50) as f64) / 12.0).exp())
            .collect();
        crate::random::tensor([4, 30, 50], &data)
    };
    experts.gate = fall(&experts.gate);
    experts.up = fall(&experts.up);
    for (precision, bound) in [(SvdPrecision::F64, 1e-4), (SvdPrecision::F32, 1e-3)] {
        let with = |method| {
            let options = LatentOptions {
                svd: SvdOptions { precision, method },
                ..LatentOptions::new(2, 20)
            };
            let (_, report) = convert_layer(&experts, None, &options).expect("it converts");
            report.errors.whole.unweighted
        };
        let (exact, random) = (with(SvdMethod::Exact), with(RANDOMIZED));
        assert!(
            random >= exact * (1.0 - 1e-6),
            "{random} below the least, {exact}"
        );
        assert!(random <= exact * (1.0 + bound), "{random} against {exact}");
    }
}

#[test]
fn tiny_huge_and_zero_weights_convert() {
    for scale in [1e-30_f32, 1e30] {
        let experts = random_experts(10, [2, 6, 16]);
        let scaled = |tensor: &rankmix::Tensor| {
            let data = tensor.to_f32().iter().map(|x| x * scale).collect();
            rankmix::Tensor::f32(tensor.shape(), data).expect("the shape fits")
        };
        let large = MoeExperts {
            gate: scaled(&experts.gate),
            up: scaled(&experts.up),
            down: scaled(&experts.down),
        };
        for precision in [SvdPrecision::F32, SvdPrecision::F64] {
            let options = LatentOptions {
                svd: SvdOptions {
                    precision,
                    ..SvdOptions::default()
                },
                ..factored(1, 8)
            };
            let error = |experts| {
                let (_, report) = convert_layer(experts, None, &options).expect("it converts");
                report.errors.whole.unweighted
            };
            let (found, expected) = (error(&large), error(&experts));
            assert!(
                (found - expected).abs() < 1e-3 * expected,
                "{scale}: {found}, {expected}"
            );
        }
    }
    let zeros = |dims: [usize; 3]| crate::random::tensor(dims, &vec![0.0; dims.iter().product()]);
    let experts = MoeExperts {
        gate: zeros([2, 6, 16]),
        up: zeros([2, 6, 16]),
        down: zeros([2, 16, 6]),
    };
    let (_, report) = convert_layer(&experts, None, &factored(1, 8)).expect("it converts");
    assert_eq!(report.errors.whole.unweighted, 0.0);
    assert_eq!(report.kept_energy, 1.0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, rng_seed: RngSeed::Fixed(417), ..ProptestConfig::default() })]

    #[test]
    fn any_shape_has_the_error_of_its_singular_values(
        groups in 1_usize..4,
        size in 1_usize..4,
        m in 1_usize..14,
        n in 1_usize..30,
        part in 0.0_f64..1.0,
        seed in any::<u64>(),
    ) {
        let experts = random_experts(seed, [groups * size, m, n]);
        let limit = (size * m).min(n);
        let latent = 1 + (part * limit as f64) as usize;
        let latent = latent.min(limit);
        let (converted, report) =
            convert_layer(&experts, None, &factored(groups, latent)).expect("it converts");
        prop_assert_eq!(
            converted.extents().expect("they fit"),
            [groups * size, groups, latent, m, n]
        );
        for operator in &report.operators {
            let members: Vec<usize> =
                (operator.group * size..(operator.group + 1) * size).collect();
            let values = singular_values(&experts, operator.operator, &members);
            let expected = if latent < values.len() { discarded(&values, latent) } else { 0.0 };
            let found = operator.errors.whole.unweighted;
            prop_assert!((found - expected).abs() < 1e-5, "{} is not {}", found, expected);
        }
    }
}
