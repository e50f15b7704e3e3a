// Arithmetic on two tensors:   y[i] = f(a[i], b[i]), with NumPy's broadcasting
//
//   FUNCTION      0 a + b    1 a - b    2 a * b    3 a / b
//
// Layouts       same_shape: all [elements] f32, as vec4s (every buffer is a multiple of 16 bytes).
//               broadcast: y is a nest of four loops, innermost first: extent, step in a, step in b (0 where repeated).
// Grid          one invocation QUADS vec4s (same_shape) or an element (broadcast), folded into (x, y).

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override FUNCTION: u32 = 0u;

struct Params {
  elements: u32,
  extent_0: u32, step_a_0: u32, step_b_0: u32,
  extent_1: u32, step_a_1: u32, step_b_1: u32,
  extent_2: u32, step_a_2: u32, step_b_2: u32,
  extent_3: u32, step_a_3: u32, step_b_3: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a4: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b4: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y4: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read> b: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

fn apply(l: vec4<f32>, r: vec4<f32>) -> vec4<f32> {
  if (FUNCTION == 0u) { return l + r; }
  if (FUNCTION == 1u) { return l - r; }
  if (FUNCTION == 2u) { return l * r; }
  return l / r;
}

@compute @workgroup_size(WORKGROUP)
fn same_shape(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) { y4[q] = apply(a4[q], b4[q]); }
  }
}

@compute @workgroup_size(WORKGROUP)
fn broadcast(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  let i0 = element % params.extent_0;
  let rest_1 = element / params.extent_0;
  let i1 = rest_1 % params.extent_1;
  let rest_2 = rest_1 / params.extent_1;
  let i2 = rest_2 % params.extent_2;
  let i3 = rest_2 / params.extent_2;
  let at_a = i0 * params.step_a_0 + i1 * params.step_a_1 + i2 * params.step_a_2 + i3 * params.step_a_3;
  let at_b = i0 * params.step_b_0 + i1 * params.step_b_1 + i2 * params.step_b_2 + i3 * params.step_b_3;
  y[element] = apply(vec4(a[at_a]), vec4(b[at_b])).x;
}
