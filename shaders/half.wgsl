// Between floats of 32 bits and of 16.
//
//   pack        halves[i] = f16(floats[i]): to the nearest; beyond the range of f16 infinite, NaN a NaN
//   unpack      floats[i] = f32(halves[i])
//
// Layouts       floats: [elements] f32 as vec4s;  halves: [elements] f16, two in a u32, the first in its low half. Every buffer is a
//               multiple of 16 bytes: what is past the end is never used.
// Grid          one invocation QUADS times four elements, folded into (x, y) because a dimension stops at 65,535 workgroups.
// Cost          6 bytes an element: memory-bound.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart

struct Params {
  elements: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> wide: array<vec4<f32>>;                    // pack only
@group(0) @binding(2) var<storage, read_write> packed_result: array<vec2<u32>>;     // pack only
@group(0) @binding(3) var<storage, read> narrow: array<vec2<u32>>;                  // unpack only
@group(0) @binding(4) var<storage, read_write> wide_result: array<vec4<f32>>;       // unpack only

@compute @workgroup_size(WORKGROUP)
fn pack(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let v = wide[q];
      packed_result[q] = vec2(half_narrow(v.xy), half_narrow(v.zw));
    }
  }
}

@compute @workgroup_size(WORKGROUP)
fn unpack(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let halves = narrow[q];
      wide_result[q] = vec4(unpack2x16float(halves.x), unpack2x16float(halves.y));
    }
  }
}
