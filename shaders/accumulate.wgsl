// Adds one tensor into another:   sum[i] += scale addend[i]
//
// Layouts       both [elements] f32, read as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS vec4s, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart

struct Params {
  elements: u32,
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> addend: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> sum: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) { sum[q] += params.scale * addend[q]; }
  }
}
