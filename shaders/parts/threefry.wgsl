// Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): two random words for a key and a
// counter, without a state. Only 32-bit additions, rotations and exclusive-ors: the same bits on every device, and on the CPU
// (`src/ops/threefry.rs`).

// One round: the sum of the words, and the second word turned left and exclusive-ored with it.
fn threefry_round(x: vec2<u32>, turn: u32) -> vec2<u32> {
  let sum = x.x + x.y;
  return vec2(sum, ((x.y << turn) | (x.y >> (32u - turn))) ^ sum);
}

fn threefry_rounds(x: vec2<u32>, turns: vec4<u32>) -> vec2<u32> {
  return threefry_round(threefry_round(threefry_round(threefry_round(x, turns.x), turns.y), turns.z), turns.w);
}

fn threefry(key: vec2<u32>, counter: vec2<u32>) -> vec2<u32> {
  let third = 0x1bd11bdau ^ key.x ^ key.y;
  let even = vec4(13u, 15u, 26u, 6u);
  let odd = vec4(17u, 29u, 16u, 24u);
  var x = threefry_rounds(counter + key, even) + vec2(key.y, third + 1u);
  x = threefry_rounds(x, odd) + vec2(third, key.x + 2u);
  x = threefry_rounds(x, even) + vec2(key.x, key.y + 3u);
  x = threefry_rounds(x, odd) + vec2(key.y, third + 4u);
  return threefry_rounds(x, even) + vec2(third, key.x + 5u);
}

