// Sums over an axis, and the repetition that undoes them.
//
//   forward     y[o, i, c] = sum over the terms t of chunk c of x[o, t, i]          (c: one chunk, or the first of two passes)
//   repeat      y[o, t, i] = x[o, i]
//
// Layouts       x: [outer, terms, inner] row-major;  y: [outer, inner, chunks].
// Grid          forward: one workgroup a sum; its invocations take every WORKGROUP-th term, then a tree in workgroup
//               memory. The order of the additions depends on the shape alone: two runs are equal bit for bit.
//               repeat: one invocation an element. Both folded into (x, y): a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;

struct Params {
  elements: u32, // forward: outer * inner; repeat: outer * terms * inner
  terms: u32,
  inner: u32,
  chunks: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  if (group >= params.elements * params.chunks) { return; }
  let chunk = group % params.chunks;
  let element = group / params.chunks;
  let outer = element / params.inner;
  let inner = element % params.inner;
  let per_chunk = (params.terms + params.chunks - 1u) / params.chunks;
  let end = min(params.terms, (chunk + 1u) * per_chunk);
  var sum = 0.0;
  for (var term = chunk * per_chunk + local; term < end; term += WORKGROUP) {
    sum += x[(outer * params.terms + term) * params.inner + inner];
  }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { y[group] = all; }
}

@compute @workgroup_size(WORKGROUP)
fn repeat(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  y[element] = x[element / (params.terms * params.inner) * params.inner + element % params.inner];
}
