//! How kernels that memory binds are spread over invocations. A software adapter wants it otherwise than GPUs: a workgroup costs some half a
//! microsecond there, a barrier as much again, and neighbouring addresses in neighbouring lanes are worth nothing.

use crate::device::{AdapterClass, Capabilities, Launch};
use crate::error::Result;

/// Rows that are enough to keep a software adapter's threads busy with one invocation a row.
pub(crate) const ENOUGH_ROWS: usize = 64;
/// Terms that one invocation adds up one after another, four by four, at the most: its rounding grows with them.
pub(crate) const LONGEST_LANE: usize = 4096;
/// Invocations of a workgroup in which each has a row.
pub(crate) const ROW_LANES: usize = 64;

fn is_software(capabilities: &Capabilities) -> bool {
    capabilities.class == AdapterClass::Software
}

/// Completes a launch whose invocations take vec4s of so many elements: the constants `WORKGROUP` and `QUADS` (vec4s an invocation), the grid
/// and its parameter. On lavapipe a copy of 64 MiB reaches 8.0 GB/s with 256 invocations of two, 6.4 with 64 of one.
///
/// # Errors
/// As [`Launch::folded`].
pub(crate) fn element_wise(
    launch: Launch,
    elements: usize,
    capabilities: &Capabilities,
) -> Result<Launch> {
    let (workgroup, quads) = if is_software(capabilities) {
        (256, 2)
    } else {
        (64, 1)
    };
    launch
        .constant("WORKGROUP", workgroup as f64)
        .constant("QUADS", quads as f64)
        .folded(elements.div_ceil(4 * workgroup * quads), capabilities)
}

/// Whether each invocation is to take a whole row, by vec4s: no barriers and no sums between lanes. GPUs would read with great strides.
pub(crate) fn row_by_invocation([rows, columns]: [usize; 2], capabilities: &Capabilities) -> bool {
    is_software(capabilities)
        && rows >= ENOUGH_ROWS
        && columns.is_multiple_of(4)
        && columns <= LONGEST_LANE
}

/// The invocations of a workgroup that reduces one row of so many elements: a power of two. The bound depends on the length and the kind of
/// adapter alone, so that the order of the additions does too. Eight are one subgroup on lavapipe, for which a barrier is cheap: softmax of 1,024
/// columns 57 us a row against 90 with 64, and 512 rows of 8 a third of the time.
pub(crate) fn row_workgroup(length: usize, capabilities: &Capabilities) -> u32 {
    match length {
        // Of a longer row eight would take too many turns in the three passes of a softmax.
        0..=131_072 if is_software(capabilities) => 8,
        0..=32 => 8,
        33..=1024 => 64,
        _ => 256,
    }
}

/// The invocations of a workgroup that works on one small problem with a barrier after every step, where `most` is what suits GPUs.
pub(crate) fn barrier_workgroup(most: usize, capabilities: &Capabilities) -> usize {
    if is_software(capabilities) {
        most.min(8)
    } else {
        most
    }
}
