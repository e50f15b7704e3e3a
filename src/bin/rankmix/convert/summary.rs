//! What a conversion into CoMoL did, in a few lines.

use rankmix::convert::CoreReport;

pub(crate) fn print(report: &CoreReport) {
    let (mut before, mut after) = (0, 0);
    for layer in &report.layers {
        before += layer.elements_before;
        after += layer.elements_after;
        println!(
            "  {}: rank {} of {} summed ({} independent in A, {} in B), largest error {:.1e}",
            layer.layer,
            layer.rank,
            layer.summed_ranks,
            layer.independent_a,
            layer.independent_b,
            layer.largest_error()
        );
    }
    let verdict = if report.lossless {
        "lossless up to rounding"
    } else {
        "lossy: a larger --rank loses less"
    };
    println!(
        "{} layers, {before} elements before, {after} after; {verdict} (largest relative error {:.1e})",
        report.layers.len(),
        report.largest_error
    );
    for name in &report.left_out {
        eprintln!("rankmix: warning: left out: {name}");
    }
    if report.base_models.len() > 1 {
        let names = report.base_models.join(", ");
        eprintln!("rankmix: warning: the adapters name different base models: {names}");
    }
}
