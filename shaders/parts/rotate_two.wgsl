// Two planes of a row, each by its angle; an angle of 0 copies. The module has parts/cos_sin.wgsl.
fn rotate_two(z: vec4<f32>, angles: vec2<f32>) -> vec4<f32> {
  let r = cos_sin(angles.x);
  let s = cos_sin(angles.y);
  let first = select(vec2(r.x * z.x - r.y * z.y, r.y * z.x + r.x * z.y), z.xy, angles.x == 0.0);
  let second = select(vec2(s.x * z.z - s.y * z.w, s.y * z.z + s.x * z.w), z.zw, angles.y == 0.0);
  return vec4(first, second);
}
