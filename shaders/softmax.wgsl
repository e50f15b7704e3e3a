// Softmax over the rows of a matrix:
//
//   forward     p[t, e] = exp(logits[t, e] - m) / s          m = max_e logits[t, e],  s = sum_e exp(logits[t, e] - m)
//   backward    dlogits[t, e] = p[t, e] (D[e] - sum_i p[t, i] D[i]),    D[e] = dp[t, e] - dp[t, largest],  largest = argmax_e p[t, e]
//
//               Any constant may be taken off a row of dp. With that of the largest probability the sum keeps its digits when this
//               probability is nearly 1: its own term is exactly 0, where dp[e] - sum_i p[i] dp[i] would cancel.
//
// Layouts       logits, p, dp, dlogits: [rows, columns] row-major; in the entry points named rows_ read as vec4s, of which a row is a whole number.
// Grid          one workgroup a row, trees in workgroup memory; rows_forward and rows_backward: one invocation a row. Folded into (x, y): a
//               dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;

struct Params {
  rows: u32,
  columns: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;        // forward only
@group(0) @binding(2) var<storage, read> p: array<f32>;             // backward only
@group(0) @binding(3) var<storage, read> dp: array<f32>;            // backward only
@group(0) @binding(4) var<storage, read_write> result: array<f32>;  // forward: p, backward: dlogits
@group(0) @binding(5) var<storage, read> logits4: array<vec4<f32>>;        // rows_forward only
@group(0) @binding(6) var<storage, read> p4: array<vec4<f32>>;             // rows_backward only
@group(0) @binding(7) var<storage, read> dp4: array<vec4<f32>>;            // rows_backward only
@group(0) @binding(8) var<storage, read_write> result4: array<vec4<f32>>;  // rows_forward and rows_backward

var<workgroup> largest_tree: array<f32, WORKGROUP>;
var<workgroup> column_tree: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  let start = row * params.columns;
  let m_s = row_soft_max(start, params.columns, local);
  for (var e = local; e < params.columns; e += WORKGROUP) {
    result[start + e] = exp(logits[start + e] - m_s.x) / m_s.y;
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  let start = row * params.columns;
  // A column that is none stays in range: lanes past the end of a short row keep column 0.
  var largest = -1.0;
  var column = 0u;
  for (var e = local; e < params.columns; e += WORKGROUP) {
    if (p[start + e] > largest) {
      largest = p[start + e];
      column = e;
    }
  }
  largest_tree[local] = largest;
  column_tree[local] = column;
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local < half && largest_tree[local + half] > largest_tree[local]) {
      largest_tree[local] = largest_tree[local + half];
      column_tree[local] = column_tree[local + half];
    }
  }
  workgroupBarrier();
  let reference = dp[start + column_tree[0]];
  var sum = 0.0;
  for (var e = local; e < params.columns; e += WORKGROUP) {
    sum += p[start + e] * (dp[start + e] - reference);
  }
  let mean = workgroup_sum(sum, local);
  for (var e = local; e < params.columns; e += WORKGROUP) {
    result[start + e] = p[start + e] * (dp[start + e] - reference - mean);
  }
}

@compute @workgroup_size(WORKGROUP)
fn rows_forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  let start = row * (params.columns / 4u);
  let end = start + params.columns / 4u;
  // As in parts/soft_max.wgsl: one read of the row, a new maximum scales down the sums so far.
  var m = LOWEST;
  var sums = vec4(0.0);
  for (var q = start; q < end; q++) {
    let v = logits4[q];
    let largest = max(max(m, v.x), max(v.y, max(v.z, v.w)));
    sums = sums * exp(max(m - largest, -87.0)) + exp(v - largest);
    m = largest;
  }
  let s = (sums.x + sums.y) + (sums.z + sums.w);
  for (var q = start; q < end; q++) { result4[q] = exp(logits4[q] - m) / s; }
}

@compute @workgroup_size(WORKGROUP)
fn rows_backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  let start = row * (params.columns / 4u);
  let end = start + params.columns / 4u;
  // The largest of each component, and its gradient, then of the four.
  var largest = p4[start];
  var references = dp4[start];
  for (var q = start + 1u; q < end; q++) {
    let v = p4[q];
    references = select(references, dp4[q], v > largest);
    largest = max(largest, v);
  }
  let even = select(references.xy, references.zw, largest.zw > largest.xy);
  let halves = max(largest.xy, largest.zw);
  let reference = select(even.x, even.y, halves.y > halves.x);
  var sums = vec4(0.0);
  for (var q = start; q < end; q++) { sums += p4[q] * (dp4[q] - reference); }
  let mean = (sums.x + sums.y) + (sums.z + sums.w);
  for (var q = start; q < end; q++) { result4[q] = p4[q] * (dp4[q] - reference - mean); }
}
