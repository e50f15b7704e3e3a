// The activation of a feed-forward layer:
//
//   forward     h = f(gate) up                      f(gate) without GATED
//   backward    d_gate = dh up f'(gate)             d_up = dh f(gate)             (without GATED: d_gate = dh f'(gate))
//
// Layouts       all [elements] f32, as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS vec4s, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override GATED: bool = true;

struct Params {
  elements: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> up: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> h: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> dh: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> d_gate: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_up: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      if (GATED) { h[q] = activate(gate[q]) * up[q]; } else { h[q] = activate(gate[q]); }
    }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let x = gate[q];
      let upstream = dh[q];
      if (GATED) {
        d_gate[q] = upstream * up[q] * activation_derivative(x);
        d_up[q] = upstream * activate(x);
      } else {
        d_gate[q] = upstream * activation_derivative(x);
      }
    }
  }
}
