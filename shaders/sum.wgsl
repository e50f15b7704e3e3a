// Sums over an axis, and the repetition that undoes them.
//
//   forward     y[o, i, c] = sum over the terms t of chunk c of x[o, t, i]          (c: one chunk, or one of those of a further pass)
//   rows        the same where i is 0 alone
//   columns     y[o, c, i] = sum over the terms t of chunk c of x[o, t, i]
//   repeat      y[o, t, i] = x[o, i]
//
// Layouts       x: [outer, terms, inner] row-major, in chunks of per_chunk terms.  rows reads it as vec4s along the terms, of which there is a
//               multiple of 4, in every chunk too; columns as vec4s along inner, a multiple of 4 as well.
// Grid          forward: one workgroup a sum; its invocations take every WORKGROUP-th term, then a tree in workgroup
//               memory. rows: one invocation a sum. columns: one invocation four neighbouring sums, neighbours on neighbouring columns.
//               repeat: one invocation an element. All folded into (x, y): a dimension stops at 65,535 workgroups. The order of the additions
//               depends on the shape and the adapter's class alone: two runs are equal bit for bit.

override WORKGROUP: u32 = 64u;

struct Params {
  elements: u32, // repeat: outer * terms * inner, else outer * inner
  terms: u32,
  inner: u32,
  chunks: u32,
  per_chunk: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> x4: array<vec4<f32>>;        // rows and columns only: x
@group(0) @binding(4) var<storage, read_write> y4: array<vec4<f32>>;  // columns only: y

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  if (group >= params.elements * params.chunks) { return; }
  let chunk = group % params.chunks;
  let element = group / params.chunks;
  let outer = element / params.inner;
  let inner = element % params.inner;
  let end = min(params.terms, (chunk + 1u) * params.per_chunk);
  var sum = 0.0;
  for (var term = chunk * params.per_chunk + local; term < end; term += WORKGROUP) {
    sum += x[(outer * params.terms + term) * params.inner + inner];
  }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { y[group] = all; }
}

@compute @workgroup_size(WORKGROUP)
fn rows(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let sum_index = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (sum_index >= params.elements * params.chunks) { return; }
  let chunk = sum_index % params.chunks;
  let start = sum_index / params.chunks * params.terms;
  let end = (start + min(params.terms, (chunk + 1u) * params.per_chunk)) / 4u;
  var sums = vec4(0.0);
  for (var q = (start + chunk * params.per_chunk) / 4u; q < end; q++) { sums += x4[q]; }
  y[sum_index] = (sums.x + sums.y) + (sums.z + sums.w);
}

@compute @workgroup_size(WORKGROUP)
fn columns(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q * 4u >= params.elements * params.chunks) { return; }
  let across = params.inner / 4u;
  let chunk = q / across % params.chunks;
  let outer = q / across / params.chunks;
  let end = min(params.terms, (chunk + 1u) * params.per_chunk);
  var sums = vec4(0.0);
  for (var term = chunk * params.per_chunk; term < end; term++) {
    sums += x4[(outer * params.terms + term) * across + q % across];
  }
  y4[q] = sums;
}

@compute @workgroup_size(WORKGROUP)
fn repeat(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  y[element] = x[element / (params.terms * params.inner) * params.inner + element % params.inner];
}
