// Matrix products of few results, or of few rows, with k split over the invocations of a workgroup, and over workgroups:
//
//   forward     c = alpha op(a) op(b)  [+ bias[n]  with BIAS]    or    c += the same, with ACCUMULATE
//               with PARTED: partial[part] = op(a) op(b) over the part's k_part of k
//   total       c = alpha sum_part partial[part]  [+ bias[n]]    or    c += the same
//
//   op(a): [m, k], stored [m, k], or [k, m] with TRANSPOSE_A;   op(b): [k, n], stored [k, n], or [n, k] with TRANSPOSE_B
//
// Layouts       row-major. A batch steps by a_batch and b_batch elements (0: the operand is shared) and m n of c; partial: [parts, batch,
//               m, n]. Operands are read as in parts/matrix_block.wgsl; EDGES = false where m is a multiple of ROWS, n and k
//               of 4. k_part is a multiple of 4 LANES_K.
// Grid          forward: one workgroup of LANES_M x LANES_N x LANES_K invocations for LANES_M x LANES_N tiles of ROWS x 4 of c; all tiles of
//               a batch entry, all entries, all parts. total: one invocation an element of c. Folded into (x, y).
// Work          an invocation takes every LANES_K-th four of k: ROWS + 4 vec4 loads for ROWS x 16 multiply-adds. Neighbours lie along k
//               where b is stored so (K_FIRST), along n otherwise: either way they read one stretch of memory.
// Order         the invocations of a tile are summed by halves in workgroup memory, then the parts one after another: no atomics, two
//               runs are equal bit for bit.

override LANES_M: u32 = 1u;
override LANES_N: u32 = 4u;
override LANES_K: u32 = 16u;
override ROWS: u32 = 4u; // or 2, or 1
override K_FIRST: bool = false;
override PARTED: bool = false;
override ACCUMULATE: bool = false;
override BIAS: bool = false;

const TOTAL_WORKGROUP = 64u;

struct Params {
  m: u32,
  n: u32,
  k: u32,
  a_batch: u32,
  b_batch: u32,
  alpha: f32,
  m_groups: u32,
  n_groups: u32,
  batch: u32,
  k_part: u32,
  parts: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;          // forward only
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;          // forward only
@group(0) @binding(3) var<storage, read_write> c: array<f32>;          // forward: c, or with PARTED partial
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> partial: array<f32>;          // total only

var<workgroup> sums: array<vec4<f32>, LANES_M * LANES_N * LANES_K * ROWS>;

// op(a) from (row, k) on: ROWS rows, each along four of k.
fn a_rows(base: u32, row: u32, k: u32) -> mat4x4<f32> {
  var rows = mat4x4<f32>();
  if (TRANSPOSE_A) {
    rows = transpose(a_block(base, k, row, params.k, params.m));
  } else {
    let at = base + row * params.k + k;
    rows[0] = a_four(at, left_of(row, k, params.m, params.k));
    if (ROWS > 1u) { rows[1] = a_four(at + params.k, left_of(row + 1u, k, params.m, params.k)); }
    if (ROWS > 2u) {
      rows[2] = a_four(at + 2u * params.k, left_of(row + 2u, k, params.m, params.k));
      rows[3] = a_four(at + 3u * params.k, left_of(row + 3u, k, params.m, params.k));
    }
  }
  return rows;
}

fn bias_at(column: u32) -> vec4<f32> {
  let last = params.n - 1u;
  return vec4(bias[min(column, last)], bias[min(column + 1u, last)], bias[min(column + 2u, last)], bias[min(column + 3u, last)]);
}

fn store(at: u32, inside: bool, value: f32) {
  if (inside) {
    if (ACCUMULATE && !PARTED) { c[at] += value; } else { c[at] = value; }
  }
}

@compute @workgroup_size(LANES_K, LANES_N, LANES_M)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let m_rest = group / params.n_groups;
  let entry_rest = m_rest / params.m_groups;
  let entry = entry_rest % params.batch;
  let part = entry_rest / params.batch;
  let tiles = LANES_M * LANES_N;
  // the invocation's place: along k, and among the tiles
  let k_step = select(tiles, 1u, K_FIRST);
  let k_lane = select(local / tiles, local % LANES_K, K_FIRST);
  let tile = select(local % tiles, local / LANES_K, K_FIRST);
  let row = ((m_rest % params.m_groups) * LANES_M + tile / LANES_N) * ROWS;
  let column = ((group % params.n_groups) * LANES_N + tile % LANES_N) * 4u;
  // no turn for those outside
  let inside = part < params.parts && row < params.m && column < params.n;
  let start = part * params.k_part;
  let end = select(0u, min(start + params.k_part, params.k), inside);
  let a_base = entry * params.a_batch;
  let b_base = entry * params.b_batch;

  var r0 = vec4(0.0);
  var r1 = vec4(0.0);
  var r2 = vec4(0.0);
  var r3 = vec4(0.0);
  for (var k = start + 4u * k_lane; k < end; k += 4u * LANES_K) {
    let x = a_rows(a_base, row, k);
    let y = b_columns(b_base, k, column);
    r0 += x[0].x * y[0] + x[0].y * y[1] + x[0].z * y[2] + x[0].w * y[3];
    if (ROWS > 1u) { r1 += x[1].x * y[0] + x[1].y * y[1] + x[1].z * y[2] + x[1].w * y[3]; }
    if (ROWS > 2u) {
      r2 += x[2].x * y[0] + x[2].y * y[1] + x[2].z * y[2] + x[2].w * y[3];
      r3 += x[3].x * y[0] + x[3].y * y[1] + x[3].z * y[2] + x[3].w * y[3];
    }
  }

  let lanes = tiles * LANES_K;
  sums[local] = r0;
  if (ROWS > 1u) { sums[local + lanes] = r1; }
  if (ROWS > 2u) {
    sums[local + 2u * lanes] = r2;
    sums[local + 3u * lanes] = r3;
  }
  workgroupBarrier();
  for (var reach = LANES_K / 2u; reach > 0u; reach = reach / 2u) {
    if (k_lane < reach) {
      let other = local + reach * k_step;
      sums[local] += sums[other];
      if (ROWS > 1u) { sums[local + lanes] += sums[other + lanes]; }
      if (ROWS > 2u) {
        sums[local + 2u * lanes] += sums[other + 2u * lanes];
        sums[local + 3u * lanes] += sums[other + 3u * lanes];
      }
    }
    workgroupBarrier();
  }
  // the tile's invocations share its rows
  let first = local - k_lane * k_step;
  for (var r = k_lane; r < ROWS; r += LANES_K) {
    var value = sums[first + r * lanes];
    var at = (entry * params.m + row + r) * params.n + column;
    if (PARTED) {
      at += part * params.batch * params.m * params.n;
    } else {
      value *= params.alpha;
      if (BIAS) { value += bias_at(column); }
    }
    let left = select(0u, left_of(row + r, column, params.m, params.n), part < params.parts);
    store(at, left > 0u, value.x);
    store(at + 1u, left > 1u, value.y);
    store(at + 2u, left > 2u, value.z);
    store(at + 3u, left > 3u, value.w);
  }
}

@compute @workgroup_size(TOTAL_WORKGROUP)
fn total(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let at = (workgroup.y * params.groups_per_row + workgroup.x) * TOTAL_WORKGROUP + local;
  let elements = params.batch * params.m * params.n;
  if (at < elements) {
    var sum = 0.0;
    for (var part = 0u; part < params.parts; part++) { sum += partial[part * elements + at]; }
    var value = params.alpha * sum;
    if (BIAS) { value += bias[at % params.n]; }
    if (ACCUMULATE) { c[at] += value; } else { c[at] = value; }
  }
}
