//! What one workgroup sorts (`shaders/parts/sort_block.wgsl`): all pairs where they are few, else a block of them.

/// Invocations of a workgroup that sorts.
pub(crate) const WORKGROUP: usize = 128;
/// Values of a digit: 8 bits.
pub(crate) const MOST_DIGITS: usize = 256;
/// Words of workgroup memory that every WebGPU device has: 16,384 bytes.
const MEMORY_WORDS: usize = 4096;
/// What an invocation walks over at least, and at most, where one workgroup sorts everything. At most 128 x 288 pairs are fewer than
/// 2^16, so that two counts share a word.
const SHARE: [usize; 2] = [16, 288];
/// The same where there are many blocks.
const BLOCK_SHARE: [usize; 2] = [32, 256];
/// Longer shares rather than more blocks: one workgroup scans the counts of all.
const MANY_BLOCKS: usize = 1024;

/// Places that a workgroup sorts by digit, a chunk an invocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SortBlock {
    /// Values of the digit.
    pub(crate) digits: usize,
    /// Invocations that have places.
    pub(crate) chunks: usize,
    /// Places of each.
    pub(crate) share: usize,
}

impl SortBlock {
    /// As a single workgroup's work; `None` where that is too much: with more than 256 keys, or with more pairs than 288 for each of as
    /// many invocations as their counts leave room for in 16 KiB. Up to 65 keys (64 experts and none) that is 34,848 pairs or more.
    pub(crate) fn of_all(keys: usize, count: usize) -> Option<Self> {
        let [least, most] = SHARE;
        if keys > MOST_DIGITS {
            return None;
        }
        let share = count.div_ceil(most_chunks(keys)).max(least);
        (share <= most).then(|| Self {
            digits: keys,
            chunks: count.div_ceil(share),
            share,
        })
    }

    /// As one of many blocks.
    pub(crate) fn of_many(digits: usize, count: usize) -> Self {
        let [least, most] = BLOCK_SHARE;
        let chunks = most_chunks(digits);
        Self {
            digits,
            chunks,
            share: count.div_ceil(chunks * MANY_BLOCKS).clamp(least, most),
        }
    }

    /// Words of workgroup memory: a power of two, so that few pipelines do for all.
    pub(crate) fn cells(&self) -> usize {
        let words = self.digits.div_ceil(2) * (self.chunks + 1) + self.digits;
        words.next_power_of_two().max(MEMORY_WORDS / 4)
    }
}

/// Chunks whose counts fit, two a word, with their sums and a start for each digit.
fn most_chunks(digits: usize) -> usize {
    ((MEMORY_WORDS - digits) / digits.div_ceil(2) - 1).min(WORKGROUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit() {
        for digits in 1..=MOST_DIGITS {
            let mut largest = 0;
            for count in 1..40_000 {
                let many = SortBlock::of_many(digits, count << 12);
                assert!(many.chunks * many.share < 1 << 16);
                let Some(block) = SortBlock::of_all(digits, count) else {
                    break;
                };
                largest = count;
                assert!(block.chunks * block.share >= count && count < 1 << 16);
                assert!(block.chunks <= WORKGROUP && block.cells() <= MEMORY_WORDS);
                assert!(many.cells() <= MEMORY_WORDS);
            }
            assert_eq!(largest, 288 * most_chunks(digits));
            assert!(digits > 65 || largest >= 34_848);
        }
        assert_eq!(SortBlock::of_all(MOST_DIGITS + 1, 1), None);
    }
}
