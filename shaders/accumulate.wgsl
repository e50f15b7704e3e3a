// Adds one tensor into another:   sum[i] += scale addend[i]
//
// Layouts       both [elements] f32, read as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation a vec4, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;

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
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q * 4u >= params.elements) { return; }
  sum[q] += params.scale * addend[q];
}
