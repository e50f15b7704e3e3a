// Matrix products:   c = alpha op(a) op(b)  [+ bias[n]  with BIAS]    or    c += the same, with ACCUMULATE
//
//   op(a): [m, k], stored [m, k], or [k, m] with TRANSPOSE_A;   op(b): [k, n], stored [k, n], or [n, k] with TRANSPOSE_B
//
// Layouts       row-major; a and b are read as vec4s of neighbours in a row (ALIGNED: every row starts at a multiple of 4), or
//               element by element. A batch steps by a_batch and b_batch elements (0: the operand is shared) and m n of c.
// Grid          one workgroup for LANES_M x LANES_N tiles of ROWS x 8 of c, all tiles of a batch entry, all entries; folded into (x, y).
// Work          an invocation keeps its tile in named vec4s and goes through k in steps of 4: with ROWS = 4 12 vec4 loads for 128
//               multiply-adds, with 8 16 for 256. Eight rows are half of all registers on some GPUs, and spill: they are for software
//               adapters. Tiles inside the matrix take the first loop; the second, guarded one does the edges and the end of k. They are two
//               loops rather than a branch, because software adapters run both sides of a branch but no loop of zero turns.
//               Where the sizes are multiples of the tile, EDGES = false leaves the second out: it is most of the compile time.

override LANES_M: u32 = 8u;
override LANES_N: u32 = 8u;
override ROWS: u32 = 4u; // or 8
override TRANSPOSE_A: bool = false;
override TRANSPOSE_B: bool = false;
override ALIGNED: bool = true;
override EDGES: bool = true;
override ACCUMULATE: bool = false;
override BIAS: bool = false;

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
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;

// Four rows of eight: row i is (li, hi).
struct Tile {
  l0: vec4<f32>, h0: vec4<f32>, l1: vec4<f32>, h1: vec4<f32>, l2: vec4<f32>, h2: vec4<f32>, l3: vec4<f32>, h3: vec4<f32>,
}

// Four rows of b (along k), eight columns.
struct Columns {
  l0: vec4<f32>, h0: vec4<f32>, l1: vec4<f32>, h1: vec4<f32>, l2: vec4<f32>, h2: vec4<f32>, l3: vec4<f32>, h3: vec4<f32>,
}

// One way out: a second return becomes a switch wherever the function is inlined, and SwiftShader compiles for minutes.
fn a_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = a[index >> 2u][index & 3u]; }
  return value;
}

fn b_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = b[index >> 2u][index & 3u]; }
  return value;
}

// Four neighbours in a stored row, zeros outside. & takes no branch: see a_element.
fn a_guarded(base: u32, row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
  let index = base + row * columns + column;
  let inside = row < rows;
  return vec4(
    a_element(index, inside & (column < columns)), a_element(index + 1u, inside & (column + 1u < columns)),
    a_element(index + 2u, inside & (column + 2u < columns)), a_element(index + 3u, inside & (column + 3u < columns)));
}

fn b_guarded(base: u32, row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
  let index = base + row * columns + column;
  let inside = row < rows;
  return vec4(
    b_element(index, inside & (column < columns)), b_element(index + 1u, inside & (column + 1u < columns)),
    b_element(index + 2u, inside & (column + 2u < columns)), b_element(index + 3u, inside & (column + 3u < columns)));
}

// Four rows of a (the columns of the matrix), four columns (along k).
fn a_rows(base: u32, row: u32, k: u32) -> mat4x4<f32> {
  if (TRANSPOSE_A) {
    let at = (base + k * params.m + row) >> 2u;
    let step = params.m >> 2u;
    return transpose(mat4x4(a[at], a[at + step], a[at + 2u * step], a[at + 3u * step]));
  }
  let at = (base + row * params.k + k) >> 2u;
  let step = params.k >> 2u;
  return mat4x4(a[at], a[at + step], a[at + 2u * step], a[at + 3u * step]);
}

fn a_rows_guarded(base: u32, row: u32, k: u32) -> mat4x4<f32> {
  let m = params.m;
  let kk = params.k;
  if (TRANSPOSE_A) {
    return transpose(mat4x4(a_guarded(base, k, row, kk, m), a_guarded(base, k + 1u, row, kk, m),
      a_guarded(base, k + 2u, row, kk, m), a_guarded(base, k + 3u, row, kk, m)));
  }
  return mat4x4(a_guarded(base, row, k, m, kk), a_guarded(base, row + 1u, k, m, kk),
    a_guarded(base, row + 2u, k, m, kk), a_guarded(base, row + 3u, k, m, kk));
}

fn b_columns(base: u32, column: u32, k: u32) -> Columns {
  if (TRANSPOSE_B) {
    let at = (base + column * params.k + k) >> 2u;
    let step = params.k >> 2u;
    let low = transpose(mat4x4(b[at], b[at + step], b[at + 2u * step], b[at + 3u * step]));
    let high = transpose(mat4x4(b[at + 4u * step], b[at + 5u * step], b[at + 6u * step], b[at + 7u * step]));
    return Columns(low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]);
  }
  let at = (base + k * params.n + column) >> 2u;
  let step = params.n >> 2u;
  return Columns(b[at], b[at + 1u], b[at + step], b[at + step + 1u],
    b[at + 2u * step], b[at + 2u * step + 1u], b[at + 3u * step], b[at + 3u * step + 1u]);
}

fn b_columns_guarded(base: u32, column: u32, k: u32) -> Columns {
  let n = params.n;
  let kk = params.k;
  if (TRANSPOSE_B) {
    let low = transpose(mat4x4(b_guarded(base, column, k, n, kk), b_guarded(base, column + 1u, k, n, kk),
      b_guarded(base, column + 2u, k, n, kk), b_guarded(base, column + 3u, k, n, kk)));
    let high = transpose(mat4x4(b_guarded(base, column + 4u, k, n, kk), b_guarded(base, column + 5u, k, n, kk),
      b_guarded(base, column + 6u, k, n, kk), b_guarded(base, column + 7u, k, n, kk)));
    return Columns(low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]);
  }
  return Columns(b_guarded(base, k, column, kk, n), b_guarded(base, k, column + 4u, kk, n),
    b_guarded(base, k + 1u, column, kk, n), b_guarded(base, k + 1u, column + 4u, kk, n),
    b_guarded(base, k + 2u, column, kk, n), b_guarded(base, k + 2u, column + 4u, kk, n),
    b_guarded(base, k + 3u, column, kk, n), b_guarded(base, k + 3u, column + 4u, kk, n));
}

fn multiply_add(t: ptr<function, Tile>, x: mat4x4<f32>, y: Columns) {
  (*t).l0 += x[0].x * y.l0 + x[0].y * y.l1 + x[0].z * y.l2 + x[0].w * y.l3;
  (*t).h0 += x[0].x * y.h0 + x[0].y * y.h1 + x[0].z * y.h2 + x[0].w * y.h3;
  (*t).l1 += x[1].x * y.l0 + x[1].y * y.l1 + x[1].z * y.l2 + x[1].w * y.l3;
  (*t).h1 += x[1].x * y.h0 + x[1].y * y.h1 + x[1].z * y.h2 + x[1].w * y.h3;
  (*t).l2 += x[2].x * y.l0 + x[2].y * y.l1 + x[2].z * y.l2 + x[2].w * y.l3;
  (*t).h2 += x[2].x * y.h0 + x[2].y * y.h1 + x[2].z * y.h2 + x[2].w * y.h3;
  (*t).l3 += x[3].x * y.l0 + x[3].y * y.l1 + x[3].z * y.l2 + x[3].w * y.l3;
  (*t).h3 += x[3].x * y.h0 + x[3].y * y.h1 + x[3].z * y.h2 + x[3].w * y.h3;
}

fn store(index: u32, inside: bool, value: f32) {
  if (inside) {
    if (ACCUMULATE) { c[index] += value; } else { c[index] = value; }
  }
}

// Four of the bias; those past the last column are not stored.
fn bias_at(column: u32) -> vec4<f32> {
  var four = vec4(0.0);
  if (BIAS) {
    let last = params.n - 1u;
    four = vec4(bias[min(column, last)], bias[min(column + 1u, last)], bias[min(column + 2u, last)], bias[min(column + 3u, last)]);
  }
  return four;
}

fn store_row(base: u32, row: u32, column: u32, low: vec4<f32>, high: vec4<f32>) {
  let index = base + row * params.n + column;
  // nothing is left in a row past the last
  let left = select(0u, params.n - min(column, params.n), row < params.m);
  store(index, left > 0u, low.x);
  store(index + 1u, left > 1u, low.y);
  store(index + 2u, left > 2u, low.z);
  store(index + 3u, left > 3u, low.w);
  store(index + 4u, left > 4u, high.x);
  store(index + 5u, left > 5u, high.y);
  store(index + 6u, left > 6u, high.z);
  store(index + 7u, left > 7u, high.w);
}

fn store_tile(base: u32, row: u32, column: u32, t: Tile) {
  let low = bias_at(column);
  let high = bias_at(column + 4u);
  store_row(base, row, column, params.alpha * t.l0 + low, params.alpha * t.h0 + high);
  store_row(base, row + 1u, column, params.alpha * t.l1 + low, params.alpha * t.h1 + high);
  store_row(base, row + 2u, column, params.alpha * t.l2 + low, params.alpha * t.h2 + high);
  store_row(base, row + 3u, column, params.alpha * t.l3 + low, params.alpha * t.h3 + high);
}

@compute @workgroup_size(LANES_N, LANES_M)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let n_group = group % params.n_groups;
  let rest = group / params.n_groups;
  let m_group = rest % params.m_groups;
  let entry = rest / params.m_groups;
  let row = (m_group * LANES_M + local.y) * ROWS;
  let column = (n_group * LANES_N + local.x) * 8u;
  if (entry >= params.batch || row >= params.m || column >= params.n) { return; }
  let a_base = entry * params.a_batch;
  let b_base = entry * params.b_batch;
  // a batch entry that does not start at a multiple of 4 elements has no aligned rows
  let interior = !EDGES || (ALIGNED && row + ROWS <= params.m && column + 8u <= params.n && ((a_base | b_base) & 3u) == 0u);
  let fast_end = select(0u, params.k & ~3u, interior);

  var tile = Tile();
  var below = Tile();
  for (var k = 0u; k < fast_end; k += 4u) {
    let columns = b_columns(b_base, column, k);
    multiply_add(&tile, a_rows(a_base, row, k), columns);
    if (ROWS == 8u) { multiply_add(&below, a_rows(a_base, row + 4u, k), columns); }
  }
  if (EDGES) {
    for (var k = fast_end; k < params.k; k += 4u) {
      let columns = b_columns_guarded(b_base, column, k);
      multiply_add(&tile, a_rows_guarded(a_base, row, k), columns);
      if (ROWS == 8u) { multiply_add(&below, a_rows_guarded(a_base, row + 4u, k), columns); }
    }
  }

  let c_base = entry * params.m * params.n;
  store_tile(c_base, row, column, tile);
  if (ROWS == 8u) { store_tile(c_base, row + 4u, column, below); }
}
