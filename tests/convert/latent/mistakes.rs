//! What cannot be converted is refused with its size and the limit.

use rankmix::convert::{Calibration, LatentOptions, convert_layer};
use rankmix::{Error, Tensor};

use crate::random::{Random, random_experts, tensor};

#[test]
fn options_that_do_not_fit_are_refused_with_the_limit() {
    let experts = random_experts(1, [6, 4, 10]);
    let cases = [
        (LatentOptions::new(4, 3), "groups = 4", "6 experts"),
        (LatentOptions::new(0, 3), "groups = 0", "6 experts"),
        (LatentOptions::new(2, 0), "latent = 0", "between 1 and 10"),
        (LatentOptions::new(2, 11), "latent = 11", "between 1 and 10"),
        (LatentOptions::new(6, 5), "latent = 5", "4 rows"),
        (
            LatentOptions {
                rank: Some(5),
                ..LatentOptions::new(2, 3)
            },
            "rank = 5",
            "4 x 10",
        ),
        (
            LatentOptions {
                rank: Some(0),
                ..LatentOptions::new(2, 3)
            },
            "rank = 0",
            "between 1 and 4",
        ),
        (
            LatentOptions {
                rank: Some(2),
                ..LatentOptions::new(2, 7)
            },
            "latent = 7",
            "between 1 and 6",
        ),
    ];
    for (options, setting, limit) in cases {
        let error = convert_layer(&experts, None, &options).expect_err("it does not fit");
        assert!(matches!(error, Error::Setting { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains(setting) && message.contains(limit),
            "{message}"
        );
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut experts = random_experts(1, [3, 4, 10]);
        let mut data = experts.down.to_f64();
        data[2 * 40 + 7] = wrong;
        experts.down = tensor([3, 10, 4], &data);
        let error = convert_layer(&experts, None, &LatentOptions::new(1, 3)).expect_err("NaN");
        assert!(
            matches!(&error, Error::NotFinite { value, element: 7 } if value.contains("down projection of expert 2")),
            "{error:?}"
        );
    }
}

#[test]
fn matrices_that_do_not_fit_each_other_are_refused() {
    let mut experts = random_experts(1, [3, 4, 10]);
    experts.up = tensor([3, 10, 4], &Random::new(2).matrix(3, 40));
    let error = convert_layer(&experts, None, &LatentOptions::new(1, 3)).expect_err("shapes");
    assert!(matches!(error, Error::Shape { .. }) && error.to_string().contains("[3, 4, 10]"));
    experts.up = Tensor::i32([3, 4, 10], vec![1; 120]).expect("the shape fits");
    let error = convert_layer(&experts, None, &LatentOptions::new(1, 3)).expect_err("integers");
    assert!(error.to_string().contains("integers"), "{error}");
}

#[test]
fn a_calibration_that_says_nothing_is_refused() {
    let calibration = |dims: Vec<usize>, data: Vec<f32>| {
        Calibration::from_activations(&Tensor::f32(dims, data).expect("the shape fits"))
    };
    let error = calibration(vec![8], vec![1.0; 8]).expect_err("no matrix");
    assert!(error.to_string().contains("[tokens, hidden]"), "{error}");
    let error = calibration(vec![2, 4], vec![0.0; 8]).expect_err("zeros");
    assert!(
        error.to_string().contains("2 tokens of 4 numbers"),
        "{error}"
    );
    let error = calibration(vec![2, 2], vec![0.0, f32::NAN, 0.0, 1.0]).expect_err("NaN");
    assert!(
        matches!(error, Error::NotFinite { element: 1, .. }),
        "{error:?}"
    );
    let other = calibration(vec![2, 4], vec![1.0; 8]).expect("numbers");
    let experts = random_experts(1, [3, 4, 10]);
    let error =
        convert_layer(&experts, Some(&other), &LatentOptions::new(1, 3)).expect_err("widths");
    let message = error.to_string();
    assert!(message.contains('4') && message.contains("10"), "{message}");
}
