//! Sums of the CPU references. Numbers of 32 bits that are added up one after the other stop to count when the sum is 2^24 times as large as
//! each of them, and lose digits long before: sums are made of chunks, each by itself. Which numbers are added in which order depends on the
//! shapes alone, not on the threads.

use std::ops::Range;

use crate::ops::Real;
use crate::ops::host_chunks::{LIGHT_CHUNK, for_chunks, in_blocks, items_per_chunk};

/// Terms of a sum that are added to one number; more are several sums, which are added in 64 bits.
pub(crate) const CHUNK: usize = 1024;
/// Sums side by side that a processor's vectors are filled with.
const LANES: usize = 16;
/// Neighbouring columns that are worth reading in one piece.
const COLUMNS: usize = 1024;

/// The sum of `term` over the elements of slices of one length, on this thread and in chunks.
pub(crate) fn sum_of<R: Real, const N: usize>(x: [&[R]; N], term: impl Fn([R; N]) -> R) -> R {
    let length = x.first().map_or(0, |x| x.len());
    if length <= CHUNK {
        return sum_in_lanes(x, &term);
    }
    let chunks = (0..length.div_ceil(CHUNK)).map(|chunk| {
        let end = length.min((chunk + 1) * CHUNK);
        sum_in_lanes(x.map(|x| &x[chunk * CHUNK..end]), &term).f64()
    });
    R::of(chunks.sum())
}

fn sum_in_lanes<R: Real, const N: usize>(x: [&[R]; N], term: &impl Fn([R; N]) -> R) -> R {
    let length = x.first().map_or(0, |x| x.len());
    let whole = length - length % LANES;
    let mut sums = [R::zero(); LANES];
    for start in (0..whole).step_by(LANES) {
        let block = x.map(|x| &x[start..start + LANES]);
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(block.map(|block| block[lane]));
        }
    }
    for (at, sum) in (whole..length).zip(&mut sums) {
        *sum += term(x.map(|x| x[at]));
    }
    sums.into_iter().sum()
}

/// [`sum_of`] on as many threads as there are.
pub(crate) fn total_of<R: Real>(x: &[R], term: impl Fn(R) -> R + Sync) -> R {
    let mut total = [R::zero()];
    sum_terms([1, x.len(), 1], &mut total, |terms, _, sums| {
        sums[0] += sum_of([&x[terms]], |[x]| term(x));
    });
    total[0]
}

/// `y[o, i] = sum over t of the terms [o, t, i]` of an operand `[outer, terms, inner]`, on as many threads as there are. `add` adds to the
/// sums of some columns i, which it is given, the terms of some rows `o * terms + t`, all of one o and at most [`CHUNK`] of them.
pub(crate) fn sum_terms<R: Real>(
    [outer, terms, inner]: [usize; 3],
    y: &mut [R],
    add: impl Fn(Range<usize>, Range<usize>, &mut [R]) + Sync,
) {
    let chunks = terms.div_ceil(CHUNK).max(1);
    let per_chunk = items_per_chunk(LIGHT_CHUNK, terms.min(CHUNK)).max(inner.min(COLUMNS));
    let add_chunks = |at: Range<usize>, sums: &mut [R]| {
        sums.fill(R::zero());
        let mut rest = sums;
        for (block, columns) in in_blocks(at, inner) {
            let (here, behind) = std::mem::take(&mut rest).split_at_mut(columns.len());
            rest = behind;
            let (o, chunk) = (block / chunks, block % chunks);
            let rows = chunk * CHUNK..terms.min((chunk + 1) * CHUNK);
            add(o * terms + rows.start..o * terms + rows.end, columns, here);
        }
    };
    if chunks == 1 {
        for_chunks(y.len(), per_chunk, [y], |at, [y]| add_chunks(at, y));
        return;
    }
    let mut partial = vec![R::zero(); outer * chunks * inner];
    for_chunks(partial.len(), per_chunk, [&mut partial], |at, [sums]| {
        add_chunks(at, sums);
    });
    let per_chunk = items_per_chunk(LIGHT_CHUNK, chunks);
    for_chunks(y.len(), per_chunk, [y], |at, [y]| {
        for (at, y) in at.zip(y) {
            let first = at / inner * chunks * inner + at % inner;
            let sums = (0..chunks).map(|chunk| partial[first + chunk * inner].f64());
            *y = R::of(sums.sum());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::{sum_of, sum_terms};

    #[test]
    fn sums_are_those_of_integers() {
        for (outer, terms, inner) in [
            (1, 0, 3),
            (1, 5, 1),
            (3, 1024, 2),
            (2, 1025, 1),
            (2, 5000, 3),
            (1, 3, 5000),
        ] {
            let x: Vec<f64> = (0..outer * terms * inner)
                .map(|at| (at * 7 % 113) as f64)
                .collect();
            let mut y = vec![1.0; outer * inner];
            sum_terms([outer, terms, inner], &mut y, |rows, columns, sums| {
                for row in rows {
                    for (sum, column) in sums.iter_mut().zip(columns.clone()) {
                        *sum += x[row * inner + column];
                    }
                }
            });
            for (at, y) in y.iter().enumerate() {
                let term = |t| x[(at / inner * terms + t) * inner + at % inner];
                assert_eq!(*y, (0..terms).map(term).sum::<f64>());
            }
        }
    }

    #[test]
    fn a_sum_counts_beyond_what_32_bits_hold_one_by_one() {
        let ones = vec![1.0_f32; (1 << 24) + 17];
        assert_eq!(sum_of([&ones], |[x]| x), ones.len() as f32);
    }
}
