//! Measures of error.

/// ||got - want|| / ||want||, and the largest difference over the largest |want|.
pub fn relative_errors(got: &[f64], want: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    let size = norm(&mut want.iter().copied());
    let largest_difference = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, f64::max);
    let largest = want.iter().map(|w| w.abs()).fold(0.0, f64::max);
    let ratio = |difference: f64, size: f64| {
        // NaN must not pass for 0.
        if difference == 0.0 {
            0.0
        } else {
            difference / size.max(1e-30)
        }
    };
    if got.iter().any(|x| !x.is_finite()) {
        return (f64::INFINITY, f64::INFINITY);
    }
    (ratio(difference, size), ratio(largest_difference, largest))
}
