// A float as f16, to the nearest; beyond its range infinite, a NaN stays one: see narrow_packed.
fn half_narrow(value: f32) -> f16 {
  let magnitude = bitcast<u32>(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return f16(value); }
  let near = f16(clamp(value, -65504.0, 65504.0));
  // 65504 + 65504 is beyond the range of f16.
  return select(near, near + near, magnitude >= 0x477ff000u);
}

