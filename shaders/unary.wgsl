// Arithmetic on one tensor:   y[i] = f(x[i])
//
//   FUNCTION      0 scale x + offset    1 x^2    2 sqrt x    3 1 / x    4 exp x    5 ln x    6 1 / (1 + exp(-x))
//
// Layouts       both [elements] f32, as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation a vec4, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override FUNCTION: u32 = 0u;

struct Params {
  elements: u32,
  scale: f32,
  offset: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q * 4u >= params.elements) { return; }
  let v = x[q];
  if (FUNCTION == 0u) {
    y[q] = params.scale * v + params.offset;
  } else if (FUNCTION == 1u) {
    y[q] = v * v;
  } else if (FUNCTION == 2u) {
    y[q] = sqrt(v);
  } else if (FUNCTION == 3u) {
    y[q] = 1.0 / v;
  } else if (FUNCTION == 4u) {
    y[q] = exp(v);
  } else if (FUNCTION == 5u) {
    y[q] = log(v);
  } else {
    // only the exponential of a number that is not positive is taken
    let e = exp(-abs(v));
    y[q] = select(e, vec4(1.0), v >= vec4(0.0)) / (1.0 + e);
  }
}
