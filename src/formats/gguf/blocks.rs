//! Elements of GGUF tensors as floats.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::formats::gguf::GgufType;

/// Blocks that one thread turns into floats at a time.
const AT_ONCE: usize = 1024;

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are the first half of a block, high nibbles the second.
fn nibbles(bytes: &[u8], floats: &mut [f32], value: impl Fn(f32) -> f32) {
    let (low, high) = floats.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(f32::from(byte & 15));
        *high = value(f32::from(byte >> 4));
    }
}

fn block_to_floats(ty: GgufType, block: &[u8], floats: &mut [f32]) {
    match ty {
        GgufType::F32 => floats[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
        GgufType::F16 => floats[0] = half_at(block, 0),
        GgufType::Bf16 => floats[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        GgufType::Q4_0 => {
            let scale = half_at(block, 0);
            nibbles(&block[2..], floats, |q| scale * (q - 8.0));
        }
        GgufType::Q4_1 => {
            let (scale, least) = (half_at(block, 0), half_at(block, 2));
            nibbles(&block[4..], floats, |q| scale * q + least);
        }
        GgufType::Q8_0 => {
            let scale = half_at(block, 0);
            for (byte, float) in block[2..].iter().zip(floats) {
                *float = scale * f32::from(byte.cast_signed());
            }
        }
        GgufType::Other(_) => {}
    }
}

/// The elements of whole blocks; none for a type that is not read.
pub(crate) fn to_floats(ty: GgufType, bytes: &[u8]) -> Vec<f32> {
    let Some((elements, block_bytes)) = ty.block() else {
        return Vec::new();
    };
    let mut floats = vec![0.0; bytes.len() / block_bytes * elements];
    floats
        .par_chunks_mut(AT_ONCE * elements)
        .zip(bytes.par_chunks(AT_ONCE * block_bytes))
        .for_each(|(floats, bytes)| {
            let blocks = bytes.chunks_exact(block_bytes);
            for (block, floats) in blocks.zip(floats.chunks_exact_mut(elements)) {
                block_to_floats(ty, block, floats);
            }
        });
    floats
}

#[cfg(test)]
mod tests {
    use super::to_floats;
    use crate::formats::gguf::GgufType;

    /// 1.5, -0.25 as 16-bit floats.
    const SCALE: [u8; 2] = [0x00, 0x3e];
    const LEAST: [u8; 2] = [0x00, 0xb4];

    #[test]
    fn nibbles_are_two_halves_of_a_block() {
        let mut block = SCALE.to_vec();
        block.extend((0..16).map(|byte| byte | (15 - byte) << 4));
        let floats = to_floats(GgufType::Q4_0, &block);
        let expected = |q: usize| 1.5 * (q as f32 - 8.0);
        for byte in 0..16 {
            assert_eq!(floats[byte], expected(byte));
            assert_eq!(floats[16 + byte], expected(15 - byte));
        }
        block.splice(2..2, LEAST);
        let floats = to_floats(GgufType::Q4_1, &block);
        for byte in 0..16 {
            assert_eq!(floats[byte], 1.5 * byte as f32 - 0.25);
            assert_eq!(floats[16 + byte], 1.5 * (15 - byte) as f32 - 0.25);
        }
    }

    #[test]
    fn bytes_are_signed() {
        let mut block = SCALE.to_vec();
        block.extend((0..32).map(|number: i8| (number - 16).to_le_bytes()[0]));
        let floats = to_floats(GgufType::Q8_0, &block);
        for (number, float) in floats.iter().enumerate() {
            assert_eq!(*float, 1.5 * (number as f32 - 16.0));
        }
    }
}
