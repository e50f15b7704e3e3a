// SiLU (swish):
//
//   forward     y = x s             s = sigmoid(x) = 1 / (1 + exp(-x))
//   backward    dx = dy s (1 + x (1 - s))
//
// Layouts       all [elements] f32, read as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS vec4s, folded into (x, y) because a dimension stops at 65,535 workgroups.
// Numbers       only exp(-|x|) is taken, which cannot overflow; 1 - s is formed from it too, so nothing cancels for large x.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart

struct Params {
  elements: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> dy: array<vec4<f32>>;              // backward only
@group(0) @binding(3) var<storage, read_write> result: array<vec4<f32>>;    // forward: y, backward: dx

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let v = x[q];
      let e = exp(-abs(v));
      result[q] = v * select(e, vec4(1.0), v >= vec4(0.0)) / (1.0 + e);
    }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let v = x[q];
      let e = exp(-abs(v));
      let positive = v >= vec4(0.0);
      let s = select(e, vec4(1.0), positive) / (1.0 + e);
      let one_minus_s = select(vec4(1.0), e, positive) / (1.0 + e);
      result[q] = dy[q] * (s * (1.0 + v * one_minus_s));
    }
  }
}
