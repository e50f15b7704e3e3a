// Matrix products on software adapters, in the tiles of parts/subgroup_tile.wgsl:
//
//   c = alpha op(a) op(b)  [+ alpha2 op(a2) op(b2)  with SECOND]  [+ bias[n]  with BIAS]     or    c += the same, with ACCUMULATE
//
//   op(a): [m, k], stored [m, k], or [k, m] with TRANSPOSE_A;   op(b): [k, n], stored [k, n], or [n, k] with TRANSPOSE_B
//
// Layouts       row-major; a and b are read as vec4s of neighbours in a row (ALIGNED: every row starts at a multiple of 4), or
//               element by element, and so is the end of k where it is no multiple of 4 (EDGES). A batch steps by a_batch and
//               b_batch elements (0: the operand is shared) and m n of c. The second product is not batched, aligned, and has no edges.
// Grid          one workgroup, which is one subgroup of 8, for a tile of 32 x 32 of c, or two of them: 64 x 32 (TALL) or 32 x 64
//               (BROAD: where b is stored by rows of k, each read 256 bytes at a time); all tiles of a batch entry, all entries; folded
//               into (x, y).
// Entry points  wide writes c as vec4s, where n is a multiple of 4; narrow writes elements.

override TRANSPOSE_A: bool = false;
override TRANSPOSE_B: bool = false;
override TRANSPOSE_A2: bool = false;
override TRANSPOSE_B2: bool = false;
override ALIGNED: bool = true;
override EDGES: bool = false;
override SECOND: bool = false;
override TALL: bool = true;
override BROAD: bool = false;
override ACCUMULATE: bool = false;
override BIAS: bool = false;

struct Params {
  m: u32,
  n: u32,
  k: u32,
  a_batch: u32,
  b_batch: u32,
  alpha: f32,
  k2: u32,
  alpha2: f32,
  m_groups: u32,
  n_groups: u32,
  batch: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>;    // wide only
@group(0) @binding(4) var<storage, read_write> elements: array<f32>;   // narrow only: c
@group(0) @binding(5) var<storage, read> a2: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> b2: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> bias: array<f32>;

// Where the four rows (or, transposed, the four of k) of a lane's block start.
fn block_at(base: u32, first: u32, last: u32, length: u32, transposed: bool) -> vec4<u32> {
  if (transposed) { return base + min(first, last & ~3u) + vec4(0u, 1u, 2u, 3u) * length; }
  return base + min(vec4(first, first + 1u, first + 2u, first + 3u), vec4(last)) * length;
}

fn a_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(a[at.x >> 2u], a[at.y >> 2u], a[at.z >> 2u], a[at.w >> 2u]);
  if (TRANSPOSE_A) { return transpose(block); }
  return block;
}

fn b_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(b[at.x >> 2u], b[at.y >> 2u], b[at.z >> 2u], b[at.w >> 2u]);
  if (TRANSPOSE_B) { return transpose(block); }
  return block;
}

fn a2_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(a2[at.x >> 2u], a2[at.y >> 2u], a2[at.z >> 2u], a2[at.w >> 2u]);
  if (TRANSPOSE_A2) { return transpose(block); }
  return block;
}

fn b2_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(b2[at.x >> 2u], b2[at.y >> 2u], b2[at.z >> 2u], b2[at.w >> 2u]);
  if (TRANSPOSE_B2) { return transpose(block); }
  return block;
}

// One way out: see a_element in matmul.wgsl.
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

// One row of op(a) from k on, zeros past the end.
fn a_edge(base: u32, row: u32, k: u32) -> vec4<f32> {
  let r = min(row, params.m - 1u);
  let at = base + select(r * params.k + k, k * params.m + r, TRANSPOSE_A);
  let step = select(1u, params.m, TRANSPOSE_A);
  return vec4(a_element(at, true), a_element(at + step, k + 1u < params.k), a_element(at + 2u * step, k + 2u < params.k),
    a_element(at + 3u * step, k + 3u < params.k));
}

// One column of op(b) from k on, zeros past the end.
fn b_edge(base: u32, column: u32, k: u32) -> vec4<f32> {
  let j = min(column, params.n - 1u);
  let at = base + select(k * params.n + j, j * params.k + k, TRANSPOSE_B);
  let step = select(params.n, 1u, TRANSPOSE_B);
  return vec4(b_element(at, true), b_element(at + step, k + 1u < params.k), b_element(at + 2u * step, k + 2u < params.k),
    b_element(at + 3u * step, k + 3u < params.k));
}

fn scale_tile(t: ptr<function, Tile>, factor: f32) {
  (*t).q0 *= factor;
  (*t).q1 *= factor;
  (*t).q2 *= factor;
  (*t).q3 *= factor;
  (*t).q4 *= factor;
  (*t).q5 *= factor;
  (*t).q6 *= factor;
  (*t).q7 *= factor;
}

// Adds the bias of a lane's four columns to every row of a tile; columns past the last are not stored.
fn add_bias(t: ptr<function, Tile>, column: u32) {
  let last = params.n - 1u;
  let four = vec4(bias[min(column, last)], bias[min(column + 1u, last)], bias[min(column + 2u, last)], bias[min(column + 3u, last)]);
  let rows = mat4x4(four, four, four, four);
  (*t).q0 += rows;
  (*t).q1 += rows;
  (*t).q2 += rows;
  (*t).q3 += rows;
  (*t).q4 += rows;
  (*t).q5 += rows;
  (*t).q6 += rows;
  (*t).q7 += rows;
}

// The same for all lanes: see segment_outer_subgroup.wgsl.
struct Place {
  inside: bool,
  entry: u32,
  row: u32,
  column: u32,
}

fn place_of(workgroup: vec3<u32>) -> Place {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let rest = group / params.n_groups;
  let entry = rest / params.m_groups;
  let row = (rest % params.m_groups) * select(32u, 64u, TALL);
  return Place(entry < params.batch, entry, row, (group % params.n_groups) * select(32u, 64u, BROAD));
}

fn product(low: ptr<function, Tile>, high: ptr<function, Tile>, place: Place, lane: u32) {
  let last_row = params.m - 1u;
  let last_column = params.n - 1u;
  let row = place.row + lane * 4u;
  let column = place.column + lane * 4u;
  let a_base = place.entry * params.a_batch;
  let b_base = place.entry * params.b_batch;
  let fast_end = select(0u, params.k & ~3u, ALIGNED & place.inside);
  if (ALIGNED) {
    var low_at = block_at(a_base, row, last_row, select(params.k, params.m, TRANSPOSE_A), TRANSPOSE_A);
    var high_at = block_at(a_base, row + 32u, last_row, select(params.k, params.m, TRANSPOSE_A), TRANSPOSE_A);
    var b_at = block_at(b_base, column, last_column, select(params.n, params.k, TRANSPOSE_B), !TRANSPOSE_B);
    var right_at = block_at(b_base, column + 32u, last_column, select(params.n, params.k, TRANSPOSE_B), !TRANSPOSE_B);
    let a_step = select(4u, 4u * params.m, TRANSPOSE_A);
    let b_step = select(4u * params.n, 4u, TRANSPOSE_B);
    for (var k = 0u; k < fast_end; k += 4u) {
      let rows = a_block(low_at);
      let columns = b_block(b_at);
      multiply_add(low, rows, columns);
      if (TALL) { multiply_add(high, a_block(high_at), columns); }
      if (BROAD) { multiply_add(high, rows, b_block(right_at)); }
      low_at += a_step;
      high_at += a_step;
      b_at += b_step;
      right_at += b_step;
    }
  }
  if (EDGES) {
    // no turn for workgroups that folding has added
    let end = select(0u, params.k, place.inside);
    for (var k = fast_end; k < end; k += 4u) {
      let rows = mat4x4(a_edge(a_base, row, k), a_edge(a_base, row + 1u, k), a_edge(a_base, row + 2u, k), a_edge(a_base, row + 3u, k));
      let columns = transpose(mat4x4(b_edge(b_base, column, k), b_edge(b_base, column + 1u, k),
        b_edge(b_base, column + 2u, k), b_edge(b_base, column + 3u, k)));
      multiply_add(low, rows, columns);
      if (TALL) {
        multiply_add(high, mat4x4(a_edge(a_base, row + 32u, k), a_edge(a_base, row + 33u, k), a_edge(a_base, row + 34u, k),
          a_edge(a_base, row + 35u, k)), columns);
      }
      if (BROAD) {
        multiply_add(high, rows, transpose(mat4x4(b_edge(b_base, column + 32u, k), b_edge(b_base, column + 33u, k),
          b_edge(b_base, column + 34u, k), b_edge(b_base, column + 35u, k))));
      }
    }
  }
  scale_tile(low, params.alpha);
  if (TALL || BROAD) { scale_tile(high, params.alpha); }
  if (SECOND) {
    var low_at = block_at(0u, row, last_row, select(params.k2, params.m, TRANSPOSE_A2), TRANSPOSE_A2);
    var high_at = block_at(0u, row + 32u, last_row, select(params.k2, params.m, TRANSPOSE_A2), TRANSPOSE_A2);
    var b_at = block_at(0u, column, last_column, select(params.n, params.k2, TRANSPOSE_B2), !TRANSPOSE_B2);
    var right_at = block_at(0u, column + 32u, last_column, select(params.n, params.k2, TRANSPOSE_B2), !TRANSPOSE_B2);
    let a_step = select(4u, 4u * params.m, TRANSPOSE_A2);
    let b_step = select(4u * params.n, 4u, TRANSPOSE_B2);
    for (var k = 0u; k < params.k2; k += 4u) {
      let rows = params.alpha2 * a2_block(low_at);
      let columns = b2_block(b_at);
      multiply_add(low, rows, columns);
      if (TALL) { multiply_add(high, params.alpha2 * a2_block(high_at), columns); }
      if (BROAD) { multiply_add(high, rows, b2_block(right_at)); }
      low_at += a_step;
      high_at += a_step;
      b_at += b_step;
      right_at += b_step;
    }
  }
  if (BIAS) {
    add_bias(low, column);
    if (TALL || BROAD) { add_bias(high, column + select(0u, 32u, BROAD)); }
  }
}

fn store_wide(place: Place, row: u32, column: u32, value: vec4<f32>) {
  if (place.inside & (column < params.n) & (row < params.m)) {
    let at = (place.entry * params.m * params.n + row * params.n + column) >> 2u;
    if (ACCUMULATE) { c[at] += value; } else { c[at] = value; }
  }
}

fn store_element(at: u32, inside: bool, value: f32) {
  if (inside) {
    if (ACCUMULATE) { elements[at] += value; } else { elements[at] = value; }
  }
}

fn store_narrow(place: Place, row: u32, column: u32, value: vec4<f32>) {
  let at = place.entry * params.m * params.n + row * params.n + column;
  let left = select(0u, params.n - min(column, params.n), place.inside & (row < params.m));
  store_element(at, left > 0u, value.x);
  store_element(at + 1u, left > 1u, value.y);
  store_element(at + 2u, left > 2u, value.z);
  store_element(at + 3u, left > 3u, value.w);
}

fn store_rows_wide(place: Place, row: u32, column: u32, q: mat4x4<f32>) {
  store_wide(place, row, column, q[0]);
  store_wide(place, row + 1u, column, q[1]);
  store_wide(place, row + 2u, column, q[2]);
  store_wide(place, row + 3u, column, q[3]);
}

fn store_rows_narrow(place: Place, row: u32, column: u32, q: mat4x4<f32>) {
  store_narrow(place, row, column, q[0]);
  store_narrow(place, row + 1u, column, q[1]);
  store_narrow(place, row + 2u, column, q[2]);
  store_narrow(place, row + 3u, column, q[3]);
}

fn store_tile_wide(place: Place, row: u32, column: u32, t: Tile) {
  store_rows_wide(place, row, column, t.q0);
  store_rows_wide(place, row + 4u, column, t.q1);
  store_rows_wide(place, row + 8u, column, t.q2);
  store_rows_wide(place, row + 12u, column, t.q3);
  store_rows_wide(place, row + 16u, column, t.q4);
  store_rows_wide(place, row + 20u, column, t.q5);
  store_rows_wide(place, row + 24u, column, t.q6);
  store_rows_wide(place, row + 28u, column, t.q7);
}

fn store_tile_narrow(place: Place, row: u32, column: u32, t: Tile) {
  store_rows_narrow(place, row, column, t.q0);
  store_rows_narrow(place, row + 4u, column, t.q1);
  store_rows_narrow(place, row + 8u, column, t.q2);
  store_rows_narrow(place, row + 12u, column, t.q3);
  store_rows_narrow(place, row + 16u, column, t.q4);
  store_rows_narrow(place, row + 20u, column, t.q5);
  store_rows_narrow(place, row + 24u, column, t.q6);
  store_rows_narrow(place, row + 28u, column, t.q7);
}

@compute @workgroup_size(8)
fn wide(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let place = place_of(workgroup);
  let column = place.column + lane * 4u;
  var low = Tile();
  var high = Tile();
  product(&low, &high, place, lane);
  store_tile_wide(place, place.row, column, low);
  if (TALL) { store_tile_wide(place, place.row + 32u, column, high); }
  if (BROAD) { store_tile_wide(place, place.row, column + 32u, high); }
}

@compute @workgroup_size(8)
fn narrow(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let place = place_of(workgroup);
  let column = place.column + lane * 4u;
  var low = Tile();
  var high = Tile();
  product(&low, &high, place, lane);
  store_tile_narrow(place, place.row, column, low);
  if (TALL) { store_tile_narrow(place, place.row + 32u, column, high); }
  if (BROAD) { store_tile_narrow(place, place.row, column + 32u, high); }
}
