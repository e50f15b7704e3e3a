//! What the integration tests share: devices, measures of error, and the list of small graphs that every op is tested with.

pub mod case;
pub mod cases;
pub mod devices;

use rankmix::Tensor;

/// ||got - want|| / ||want||, and the largest difference over the largest |want|.
pub fn relative_errors(got: &[f64], want: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    let size = norm(&mut want.iter().copied());
    let largest_difference = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
    let largest = want.iter().map(|w| w.abs()).fold(0.0, f64::max);
    let ratio = |difference: f64, size: f64| {
        // NaN must not pass for 0.
        if difference == 0.0 { 0.0 } else { difference / size.max(1e-30) }
    };
    if got.iter().any(|x| !x.is_finite()) {
        return (f64::INFINITY, f64::INFINITY);
    }
    (ratio(difference, size), ratio(largest_difference, largest))
}

/// Panics unless `got` is within the tolerance for f32 kernels: 1e-5 in norm, 1e-4 of the largest.
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{what}: shapes differ");
    let (norm, largest) = relative_errors(&got.to_f64(), &want.to_f64());
    assert!(norm <= 1e-5 && largest <= 1e-4, "{what}: relative error {norm:.2e} in norm, {largest:.2e} of the largest");
}
