// What measures an adapter's own limits.
//
//   multiply_adds   y[i] = the sum over CHAINS numbers c of v after 4 turns steps v = factor v + offset, from v = x[i] + c.
//                   The chains do not depend on one another, stay in registers, and touch memory once: the rate of arithmetic.
//   copy            y[i] = x[i]: the bandwidth of memory.
//
//   FUSED         whether a step is fma() or a product and a sum, which a compiler may fuse or not.
//
// Layouts       both [elements] f32, as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation a vec4, or QUADS of them (copy), folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override CHAINS: u32 = 8u;
override FUSED: bool = false;

struct Params {
  elements: u32,
  turns: u32,
  factor: f32,
  offset: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

struct Chains {
  c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>,
  c4: vec4<f32>, c5: vec4<f32>, c6: vec4<f32>, c7: vec4<f32>,
}

fn step_of(v: vec4<f32>, factor: vec4<f32>, offset: vec4<f32>) -> vec4<f32> {
  if (FUSED) { return fma(v, factor, offset); }
  return v * factor + offset;
}

// One step of every chain, side by side, so that each has the time of the others to finish.
fn advanced(chains: Chains, factor: vec4<f32>, offset: vec4<f32>) -> Chains {
  var next = chains;
  next.c0 = step_of(next.c0, factor, offset);
  if (CHAINS > 1u) { next.c1 = step_of(next.c1, factor, offset); }
  if (CHAINS > 2u) { next.c2 = step_of(next.c2, factor, offset); }
  if (CHAINS > 3u) { next.c3 = step_of(next.c3, factor, offset); }
  if (CHAINS > 4u) { next.c4 = step_of(next.c4, factor, offset); }
  if (CHAINS > 5u) { next.c5 = step_of(next.c5, factor, offset); }
  if (CHAINS > 6u) { next.c6 = step_of(next.c6, factor, offset); }
  if (CHAINS > 7u) { next.c7 = step_of(next.c7, factor, offset); }
  return next;
}

@compute @workgroup_size(WORKGROUP)
fn multiply_adds(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q * 4u >= params.elements) { return; }
  let factor = vec4(params.factor);
  let offset = vec4(params.offset);
  let v = x[q];
  var chains = Chains(v, v + 1.0, v + 2.0, v + 3.0, v + 4.0, v + 5.0, v + 6.0, v + 7.0);
  for (var turn = 0u; turn < params.turns; turn++) {
    chains = advanced(chains, factor, offset);
    chains = advanced(chains, factor, offset);
    chains = advanced(chains, factor, offset);
    chains = advanced(chains, factor, offset);
  }
  var sum = chains.c0;
  if (CHAINS > 1u) { sum += chains.c1; }
  if (CHAINS > 2u) { sum += chains.c2; }
  if (CHAINS > 3u) { sum += chains.c3; }
  if (CHAINS > 4u) { sum += chains.c4; }
  if (CHAINS > 5u) { sum += chains.c5; }
  if (CHAINS > 6u) { sum += chains.c6; }
  if (CHAINS > 7u) { sum += chains.c7; }
  y[q] = sum;
}

@compute @workgroup_size(WORKGROUP)
fn copy(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) { y[q] = x[q]; }
  }
}
