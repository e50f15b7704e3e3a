// Copies one buffer to another, inside the compute pass: an operation that writes over an operand needs a copy of it first
// where the operand is used again later.
//
// Layouts       both buffers as 16-byte words, the size every buffer is a multiple of.
// Grid          one invocation QUADS words, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // words of an invocation, WORKGROUP apart

struct Params {
  words: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> copy: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let word = first + turn * WORKGROUP;
    if (word < params.words) { copy[word] = source[word]; }
  }
}
