//! The random numbers behind dropout: Threefry-2x32, in the same bits as `shaders/parts/threefry.wgsl`.

/// Threefry-2x32 with 20 rounds: two random words for a key and a counter, without a state (Salmon et al. 2011, "Parallel random
/// numbers: as easy as 1, 2, 3"). [`Graph::dropout`](crate::Graph::dropout) says which key and counter an element has, so that a host can
/// foretell a mask.
#[must_use]
pub fn threefry(key: [u32; 2], counter: [u32; 2]) -> [u32; 2] {
    const TURNS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let keys = [key[0], key[1], 0x1bd1_1bda ^ key[0] ^ key[1]];
    let mut x = [
        counter[0].wrapping_add(keys[0]),
        counter[1].wrapping_add(keys[1]),
    ];
    for group in 0..5 {
        for turn in TURNS[group % 2] {
            x[0] = x[0].wrapping_add(x[1]);
            x[1] = x[1].rotate_left(turn) ^ x[0];
        }
        x[0] = x[0].wrapping_add(keys[(group + 1) % 3]);
        x[1] = x[1]
            .wrapping_add(keys[(group + 2) % 3])
            .wrapping_add(group as u32 + 1);
    }
    x
}
