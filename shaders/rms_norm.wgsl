// Normalisation by the root mean square of a row:
//
//   forward           y = x i w,   i = 1 / sqrt(mean(x^2) + epsilon), one a row, kept for the gradients
//   input_gradient    dx = i (g - x i^2 mean(g x)),   g = dy w
//   weight_partial    partial[chunk] = sum over the rows of a chunk of dy x i
//   weight_total      dw = sum over the chunks of partial[chunk]
//
// Layouts       x, y, dy, dx: [rows, n] row-major;  w, dw: [n];  i: [rows];  partial: [chunks, n].  The entry points named four_ read them
//               as vec4s, of which a row is a whole number.
// Grid          forward, input_gradient: one workgroup a row, its invocations side by side along the row, a tree in workgroup
//               memory for the sum. weight_partial: one invocation a column and chunk of rows, neighbours on neighbouring
//               columns; weight_total: one invocation a column. A chunk is about sqrt(rows) rows, so that neither of the two
//               adds up long sums one by one. four_forward, four_input_gradient: one invocation a row, without a tree;
//               four_weight_partial, four_weight_total: one invocation four columns. All folded into (x, y): a dimension stops at 65,535 workgroups.
// Cost          forward 12 bytes an element where a row stays in cache, input_gradient 20, weight_partial 8: memory-bound.

override WORKGROUP: u32 = 64u;

struct Params {
  rows: u32,
  n: u32,
  epsilon: f32,
  rows_per_chunk: u32,
  chunks: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> inverse: array<f32>;               // the gradients only
@group(0) @binding(4) var<storage, read> dy: array<f32>;                    // the gradients only
@group(0) @binding(5) var<storage, read> partial: array<f32>;               // weight_total only
@group(0) @binding(6) var<storage, read_write> result: array<f32>;          // y, dx, partial, dw
@group(0) @binding(7) var<storage, read_write> inverse_result: array<f32>;  // the forward ones only
// As above, for the entry points named four_.
@group(0) @binding(8) var<storage, read> x4: array<vec4<f32>>;
@group(0) @binding(9) var<storage, read> weight4: array<vec4<f32>>;
@group(0) @binding(10) var<storage, read> dy4: array<vec4<f32>>;
@group(0) @binding(11) var<storage, read> partial4: array<vec4<f32>>;
@group(0) @binding(12) var<storage, read_write> result4: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  let start = row * params.n;
  var squares = 0.0;
  for (var j = local; j < params.n; j += WORKGROUP) {
    squares += x[start + j] * x[start + j];
  }
  let i = inverseSqrt(workgroup_sum(squares, local) / f32(params.n) + params.epsilon);
  for (var j = local; j < params.n; j += WORKGROUP) {
    result[start + j] = x[start + j] * i * weight[j];
  }
  if (local == 0u) { inverse_result[row] = i; }
}

@compute @workgroup_size(WORKGROUP)
fn input_gradient(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  let start = row * params.n;
  let i = inverse[row];
  // The sum of g (x i) rather than of g x: x i is of size 1 whatever the size of x.
  var products = 0.0;
  for (var j = local; j < params.n; j += WORKGROUP) {
    products += dy[start + j] * weight[j] * (x[start + j] * i);
  }
  let mean = workgroup_sum(products, local) / f32(params.n);
  for (var j = local; j < params.n; j += WORKGROUP) {
    result[start + j] = i * (dy[start + j] * weight[j] - (x[start + j] * i) * mean);
  }
}

@compute @workgroup_size(WORKGROUP)
fn weight_partial(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let columns = (params.n + WORKGROUP - 1u) / WORKGROUP;
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let j = group % columns * WORKGROUP + local;
  let chunk = group / columns;
  if (chunk >= params.chunks || j >= params.n) { return; }
  let end = min(params.rows, (chunk + 1u) * params.rows_per_chunk);
  var sum = 0.0;
  for (var row = chunk * params.rows_per_chunk; row < end; row += 1u) {
    sum += dy[row * params.n + j] * (x[row * params.n + j] * inverse[row]);
  }
  result[chunk * params.n + j] = sum;
}

@compute @workgroup_size(WORKGROUP)
fn weight_total(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let j = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (j >= params.n) { return; }
  var sum = 0.0;
  for (var chunk = 0u; chunk < params.chunks; chunk += 1u) {
    sum += partial[chunk * params.n + j];
  }
  result[j] = sum;
}

@compute @workgroup_size(WORKGROUP)
fn four_forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  let across = params.n / 4u;
  let start = row * across;
  var squares = vec4(0.0);
  for (var j = 0u; j < across; j++) {
    let v = x4[start + j];
    squares += v * v;
  }
  let i = inverseSqrt(((squares.x + squares.y) + (squares.z + squares.w)) / f32(params.n) + params.epsilon);
  for (var j = 0u; j < across; j++) {
    result4[start + j] = x4[start + j] * i * weight4[j];
  }
  inverse_result[row] = i;
}

@compute @workgroup_size(WORKGROUP)
fn four_input_gradient(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  let across = params.n / 4u;
  let start = row * across;
  let i = inverse[row];
  var products = vec4(0.0);
  for (var j = 0u; j < across; j++) {
    products += dy4[start + j] * weight4[j] * (x4[start + j] * i);
  }
  let mean = ((products.x + products.y) + (products.z + products.w)) / f32(params.n);
  for (var j = 0u; j < across; j++) {
    result4[start + j] = i * (dy4[start + j] * weight4[j] - (x4[start + j] * i) * mean);
  }
}

@compute @workgroup_size(WORKGROUP)
fn four_weight_partial(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let across = params.n / 4u;
  let chunk = q / across;
  if (chunk >= params.chunks) { return; }
  let end = min(params.rows, (chunk + 1u) * params.rows_per_chunk);
  var sums = vec4(0.0);
  for (var row = chunk * params.rows_per_chunk; row < end; row++) {
    let at = row * across + q % across;
    sums += dy4[at] * (x4[at] * inverse[row]);
  }
  result4[q] = sums;
}

@compute @workgroup_size(WORKGROUP)
fn four_weight_total(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let across = params.n / 4u;
  if (q >= across) { return; }
  var sums = vec4(0.0);
  for (var chunk = 0u; chunk < params.chunks; chunk++) { sums += partial4[chunk * across + q]; }
  result4[q] = sums;
}
