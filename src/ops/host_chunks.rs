//! How the CPU references of small operations are spread over threads: in chunks whose elements do not depend on one another, so that no
//! result depends on how many threads there are.

use std::ops::Range;

use crate::ops::Real;

/// Elements that a thread takes at a time where each costs little more than to read it: some 10 us. Fewer than two chunks stay on the thread
/// that they are on, because to wake another takes as long.
pub(crate) const LIGHT_CHUNK: usize = 1 << 15;
/// The same where each costs an exponential or a hyperbolic tangent.
pub(crate) const HEAVY_CHUNK: usize = 1 << 12;

/// How many items of so many elements make a chunk of about `chunk` elements.
pub(crate) fn items_per_chunk(chunk: usize, elements_per_item: usize) -> usize {
    (chunk / elements_per_item.max(1)).max(1)
}

/// Calls `each` for chunks of at most `per_chunk` items, on as many threads as there are, until all of `0..items` are done. Every output has
/// as many elements for each item, and `each` is given those of its chunk's items.
pub(crate) fn for_chunks<R: Real, const M: usize>(
    items: usize,
    per_chunk: usize,
    outputs: [&mut [R]; M],
    each: impl Fn(Range<usize>, [&mut [R]; M]) + Sync,
) {
    if items > 0 {
        split(0..items, per_chunk.max(1), outputs, &each);
    }
}

fn split<R: Real, const M: usize>(
    items: Range<usize>,
    per_chunk: usize,
    outputs: [&mut [R]; M],
    each: &(impl Fn(Range<usize>, [&mut [R]; M]) + Sync),
) {
    let count = items.len();
    if count <= per_chunk {
        return each(items, outputs);
    }
    let half = count.div_ceil(per_chunk).div_ceil(2) * per_chunk;
    let mut second = [const { None }; M];
    let mut places = second.iter_mut();
    let first = outputs.map(|output| {
        let (first, rest) = output.split_at_mut(output.len() / count * half);
        if let Some(place) = places.next() {
            *place = Some(rest);
        }
        first
    });
    let second = second.map(Option::unwrap_or_default);
    let middle = items.start + half;
    rayon::join(
        || split(items.start..middle, per_chunk, first, each),
        || split(middle..items.end, per_chunk, second, each),
    );
}

/// [`for_chunks`] of one output, element by element from inputs of the same length.
pub(crate) fn map_elements<R: Real, const N: usize>(
    chunk: usize,
    y: &mut [R],
    x: [&[R]; N],
    function: impl Fn([R; N]) -> R + Sync,
) {
    for_chunks(y.len(), chunk, [y], |at, [y]| {
        let x = x.map(|x| &x[at.clone()][..y.len()]);
        for (place, y) in y.iter_mut().enumerate() {
            *y = function(x.map(|x| x[place]));
        }
    });
}

/// The parts of a range that lie in one block of `length` each: the number of the block, and the part counted from its start.
pub(crate) fn in_blocks(
    range: Range<usize>,
    length: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        if start >= range.end {
            return None;
        }
        let block = start / length;
        let end = range.end.min((block + 1) * length);
        let part = start - block * length..end - block * length;
        start = end;
        Some((block, part))
    })
}

#[cfg(test)]
mod tests {
    use super::{for_chunks, in_blocks};

    #[test]
    fn every_item_is_given_once_with_its_own_outputs() {
        for (items, per_chunk) in [(0, 4), (1, 4), (4, 4), (5, 4), (103, 4), (103, 1)] {
            let (mut one, mut three) = (vec![0.0_f32; items], vec![0.0_f32; 3 * items]);
            for_chunks(
                items,
                per_chunk,
                [&mut one, &mut three],
                |at, [one, three]| {
                    assert!(at.len() <= per_chunk && one.len() == at.len());
                    for (item, (one, three)) in at.zip(one.iter_mut().zip(three.chunks_mut(3))) {
                        *one += 1.0 + item as f32;
                        three.fill(*one);
                    }
                },
            );
            let expected: Vec<f32> = (0..items).map(|item| 1.0 + item as f32).collect();
            assert_eq!(one, expected);
            assert!(three.iter().zip(0..).all(|(&x, at)| x == expected[at / 3]));
        }
    }

    #[test]
    fn a_range_falls_into_blocks() {
        let parts: Vec<_> = in_blocks(3..11, 4).collect();
        assert_eq!(parts, [(0, 3..4), (1, 0..4), (2, 0..3)]);
        assert_eq!(in_blocks(5..5, 4).count(), 0);
    }
}
