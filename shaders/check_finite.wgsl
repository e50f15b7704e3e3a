// Checked mode: finds the first element of a value that is NaN or infinite.
//
//   first[check] = min over elements that are not finite of their index       (starts at 0xffffffff)
//
// Layouts       values: [elements] f32 (forward) or f16, two in a word (halves), read as bits, because WGSL may assume that no NaN
//               exists and drop a comparison.
// Grid          one invocation an element, folded into (x, y). An integer minimum is the same in any order.

override WORKGROUP: u32 = 64u;

struct Params {
  elements: u32,
  check: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read_write> first: array<atomic<u32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  if ((values[element] & 0x7f800000u) == 0x7f800000u) {
    atomicMin(&first[params.check], element);
  }
}

@compute @workgroup_size(WORKGROUP)
fn halves(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  if (((values[element >> 1u] >> (16u * (element & 1u))) & 0x7c00u) == 0x7c00u) {
    atomicMin(&first[params.check], element);
  }
}
