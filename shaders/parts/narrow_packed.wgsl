// Two floats as halves in one word, to the nearest. What is too large becomes infinite and a NaN stays one on every driver: WGSL
// leaves both open, and loss scaling looks for them. On bits, because WGSL may assume that there is no infinity. 65,520
// (0x477ff000) is where rounding to the nearest leaves the range of f16.
fn half_special(value: f32, packed: u32) -> u32 {
  let bits = bitcast<u32>(value);
  let magnitude = bits & 0x7fffffffu;
  let special = select(0x7c00u, 0x7e00u, magnitude > 0x7f800000u) | ((bits >> 16u) & 0x8000u);
  return select(packed, special, magnitude >= 0x477ff000u);
}

fn half_narrow(value: vec2<f32>) -> u32 {
  let packed = pack2x16float(clamp(value, vec2(-65504.0), vec2(65504.0)));
  return half_special(value.x, packed & 0xffffu) | (half_special(value.y, packed >> 16u) << 16u);
}

