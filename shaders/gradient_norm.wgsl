// The norm of all gradients together, and the factor that clips it.
//
//   partial_sums   sums[first + c] = sum over the elements x of chunk c of x^2            (one launch a gradient)
//   finish         sums[0] = norm = sqrt(sum of values),   sums[1] = min(1, max_norm / (norm + 1e-6))
//
// Layouts        values: a gradient, or all partial sums;  sums: the partial sums, or [norm, scale].
// Grid           one workgroup a chunk; finish: one workgroup. Each invocation takes every WORKGROUP-th element, then a tree in
//                workgroup memory: the order of the additions depends on the shapes alone.

override WORKGROUP: u32 = 256u;

struct Params {
  elements: u32,
  chunk: u32,
  first: u32,
  max_norm: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn partial_sums(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let chunk = workgroup.y * params.groups_per_row + workgroup.x;
  let start = chunk * params.chunk;
  if (start >= params.elements) { return; }
  let end = min(start + params.chunk, params.elements);
  var sum = 0.0;
  for (var at = start + local; at < end; at += WORKGROUP) { sum += values[at] * values[at]; }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { sums[params.first + chunk] = all; }
}

@compute @workgroup_size(WORKGROUP)
fn finish(@builtin(local_invocation_index) local: u32) {
  var sum = 0.0;
  for (var at = local; at < params.elements; at += WORKGROUP) { sum += values[at]; }
  let norm = sqrt(workgroup_sum(sum, local));
  if (local == 0u) {
    sums[0] = norm;
    sums[1] = min(1.0, params.max_norm / (norm + 1e-6));
  }
}
