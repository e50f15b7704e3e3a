// Sets a tensor to zero:   values[i] = 0
//
// Layouts       [elements] f32, written as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation a vec4, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;

struct Params {
  elements: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> values: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q * 4u >= params.elements) { return; }
  values[q] = vec4(0.0);
}
