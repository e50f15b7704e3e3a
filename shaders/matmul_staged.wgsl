// Matrix products of many results on GPUs, both operands by way of workgroup memory:
//
//   c = alpha op(a) op(b)  [+ alpha2 op(a2) op(b2)  with SECOND]  [+ bias[n]  with BIAS]     or    c += the same, with ACCUMULATE
//
//   op(a): [m, k], stored [m, k], or [k, m] with TRANSPOSE_A;   op(b): [k, n], stored [k, n], or [n, k] with TRANSPOSE_B
//
// Layouts       row-major. A batch steps by a_batch and b_batch elements (0: the operand is shared) and m n of c; the second product is
//               not batched. Operands are read as in parts/matrix_block.wgsl; EDGES = false where m and n are multiples of the tile, k of 16.
// Grid          one workgroup of LANES = 128 for a tile of 64 x 64 of c, or of LANES = 64 for one of 32 x 32; all tiles of a batch
//               entry, all entries; folded into (x, y).
// Work          a step is 16 of k. An invocation brings one block of 4 x 4 of either operand into workgroup memory: there are as many as
//               invocations. Both operands lie there by rows of k, transposed where they are stored otherwise, so that the inner loop
//               reads vec4s along m and along n. Each invocation makes 8 x 4 results (4 x 4 in the small tile): 3 vec4 reads of
//               workgroup memory, which are broadcasts or neighbours, for 32 multiply-adds. After every four of k two vec4s are left
//               free: with 64 bytes of each row read at a time, eight neighbours then write to eight different banks of 16 bytes.

override LANES: u32 = 128u; // the tile's side is half of it
override TRANSPOSE_A2: bool = false;
override TRANSPOSE_B2: bool = false;
override SECOND: bool = false;
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
@group(0) @binding(3) var<storage, read_write> c: array<f32>;
@group(0) @binding(4) var<storage, read> a2: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> b2: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> bias: array<f32>;

// Four slabs of four rows of k.
var<workgroup> left_tile: array<vec4<f32>, 2u * LANES + 8u>;
var<workgroup> right_tile: array<vec4<f32>, 2u * LANES + 8u>;

fn a2_element(at: u32, inside: bool) -> f32 {
  let index = select(0u, at, inside);
  return select(0.0, a2[index >> 2u][index & 3u], inside);
}

fn b2_element(at: u32, inside: bool) -> f32 {
  let index = select(0u, at, inside);
  return select(0.0, b2[index >> 2u][index & 3u], inside);
}

fn a2_four(at: u32, left: u32) -> vec4<f32> {
  var four = vec4(0.0);
  if (!EDGES) {
    four = a2[at >> 2u];
  } else if (ALIGNED_A) {
    let inside = left > 0u;
    four = select(four, a2[select(0u, at >> 2u, inside)], inside);
  } else {
    four = vec4(a2_element(at, left > 0u), a2_element(at + 1u, left > 1u), a2_element(at + 2u, left > 2u), a2_element(at + 3u, left > 3u));
  }
  return four;
}

fn b2_four(at: u32, left: u32) -> vec4<f32> {
  var four = vec4(0.0);
  if (!EDGES) {
    four = b2[at >> 2u];
  } else if (ALIGNED_B) {
    let inside = left > 0u;
    four = select(four, b2[select(0u, at >> 2u, inside)], inside);
  } else {
    four = vec4(b2_element(at, left > 0u), b2_element(at + 1u, left > 1u), b2_element(at + 2u, left > 2u), b2_element(at + 3u, left > 3u));
  }
  return four;
}

fn a2_block(row: u32, column: u32, rows: u32, length: u32) -> mat4x4<f32> {
  let at = row * length + column;
  return mat4x4(
    a2_four(at, left_of(row, column, rows, length)),
    a2_four(at + length, left_of(row + 1u, column, rows, length)),
    a2_four(at + 2u * length, left_of(row + 2u, column, rows, length)),
    a2_four(at + 3u * length, left_of(row + 3u, column, rows, length)));
}

fn b2_block(row: u32, column: u32, rows: u32, length: u32) -> mat4x4<f32> {
  let at = row * length + column;
  return mat4x4(
    b2_four(at, left_of(row, column, rows, length)),
    b2_four(at + length, left_of(row + 1u, column, rows, length)),
    b2_four(at + 2u * length, left_of(row + 2u, column, rows, length)),
    b2_four(at + 3u * length, left_of(row + 3u, column, rows, length)));
}

// op(a) from (row, k) on: four of k, each along the rows.
fn a_rows(base: u32, row: u32, k: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
  if (TRANSPOSE_A) {
    block = a_block(base, k, row, params.k, params.m);
  } else {
    block = transpose(a_block(base, row, k, params.m, params.k));
  }
  return block;
}

fn a2_rows(row: u32, k: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
  if (TRANSPOSE_A2) {
    block = a2_block(k, row, params.k2, params.m);
  } else {
    block = transpose(a2_block(row, k, params.m, params.k2));
  }
  return block;
}

fn b2_columns(k: u32, column: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
  if (TRANSPOSE_B2) {
    block = transpose(b2_block(column, k, params.n, params.k2));
  } else {
    block = b2_block(k, column, params.k2, params.n);
  }
  return block;
}

// Which block of an operand an invocation brings: x of four along the rows or columns, y of four along k. Neighbours lie along the stored rows.
fn block_of(lane: u32, along_k: bool) -> vec2<u32> {
  let blocks = LANES >> 3u;
  return select(vec2(lane % blocks, lane / blocks), vec2(lane >> 2u, lane & 3u), along_k);
}

fn stage_left(block: vec2<u32>, value: mat4x4<f32>) {
  let blocks = LANES >> 3u;
  let at = block.y * (4u * blocks + 2u) + block.x;
  left_tile[at] = value[0];
  left_tile[at + blocks] = value[1];
  left_tile[at + 2u * blocks] = value[2];
  left_tile[at + 3u * blocks] = value[3];
}

fn stage_right(block: vec2<u32>, value: mat4x4<f32>) {
  let blocks = LANES >> 3u;
  let at = block.y * (4u * blocks + 2u) + block.x;
  right_tile[at] = value[0];
  right_tile[at + blocks] = value[1];
  right_tile[at + 2u * blocks] = value[2];
  right_tile[at + 3u * blocks] = value[3];
}

// Four rows of four columns.
struct Tile {
  r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>,
}

fn multiply_add(t: ptr<function, Tile>, x: vec4<f32>, y: vec4<f32>) {
  (*t).r0 += x.x * y;
  (*t).r1 += x.y * y;
  (*t).r2 += x.z * y;
  (*t).r3 += x.w * y;
}

// 16 of k.
fn multiply_step(low: ptr<function, Tile>, high: ptr<function, Tile>, row_block: u32, column_block: u32) {
  let blocks = LANES >> 3u;
  for (var slab = 0u; slab < 4u; slab++) {
    let start = slab * (4u * blocks + 2u);
    let left = start + row_block;
    let right = start + column_block;
    let y0 = right_tile[right];
    multiply_add(low, left_tile[left], y0);
    if (LANES == 128u) { multiply_add(high, left_tile[left + 1u], y0); }
    let y1 = right_tile[right + blocks];
    multiply_add(low, left_tile[left + blocks], y1);
    if (LANES == 128u) { multiply_add(high, left_tile[left + blocks + 1u], y1); }
    let y2 = right_tile[right + 2u * blocks];
    multiply_add(low, left_tile[left + 2u * blocks], y2);
    if (LANES == 128u) { multiply_add(high, left_tile[left + 2u * blocks + 1u], y2); }
    let y3 = right_tile[right + 3u * blocks];
    multiply_add(low, left_tile[left + 3u * blocks], y3);
    if (LANES == 128u) { multiply_add(high, left_tile[left + 3u * blocks + 1u], y3); }
  }
}

fn store(at: u32, inside: bool, value: f32) {
  if (inside) {
    if (ACCUMULATE) { c[at] += value; } else { c[at] = value; }
  }
}

fn store_row(base: u32, row: u32, column: u32, value: vec4<f32>) {
  let at = base + row * params.n + column;
  let left = left_of(row, column, params.m, params.n);
  store(at, !EDGES || left > 0u, value.x);
  store(at + 1u, !EDGES || left > 1u, value.y);
  store(at + 2u, !EDGES || left > 2u, value.z);
  store(at + 3u, !EDGES || left > 3u, value.w);
}

fn store_tile(base: u32, row: u32, column: u32, factor: f32, t: Tile) {
  var four = vec4(0.0);
  if (BIAS) {
    let last = params.n - 1u;
    four = vec4(bias[min(column, last)], bias[min(column + 1u, last)], bias[min(column + 2u, last)], bias[min(column + 3u, last)]);
  }
  store_row(base, row, column, factor * t.r0 + four);
  store_row(base, row + 1u, column, factor * t.r1 + four);
  store_row(base, row + 2u, column, factor * t.r2 + four);
  store_row(base, row + 3u, column, factor * t.r3 + four);
}

fn scale_tile(t: ptr<function, Tile>, factor: f32) {
  (*t).r0 *= factor;
  (*t).r1 *= factor;
  (*t).r2 *= factor;
  (*t).r3 *= factor;
}

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let side = LANES >> 1u;
  let blocks = LANES >> 3u;
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let rest = group / params.n_groups;
  let entry = rest / params.m_groups;
  let tile_row = (rest % params.m_groups) * side;
  let tile_column = (group % params.n_groups) * side;
  let a_base = entry * params.a_batch;
  let b_base = entry * params.b_batch;
  // the first half of the workgroup brings the left operand, the other half the right one
  let is_left = local < side;
  let lane = local % side;
  let column_block = local % blocks;
  let row_block = (local / blocks) * (LANES >> 6u);
  // no turn for the groups that only fill the grid
  let inside = entry < params.batch;
  let end = select(0u, params.k, inside);

  var low = Tile();
  var high = Tile();
  for (var k = 0u; k < end; k += 16u) {
    // until the step before has been read
    workgroupBarrier();
    if (is_left) {
      let block = block_of(lane, !TRANSPOSE_A);
      stage_left(block, a_rows(a_base, tile_row + 4u * block.x, k + 4u * block.y));
    } else {
      let block = block_of(lane, TRANSPOSE_B);
      stage_right(block, b_columns(b_base, k + 4u * block.y, tile_column + 4u * block.x));
    }
    workgroupBarrier();
    multiply_step(&low, &high, row_block, column_block);
  }
  var factor = params.alpha;
  if (SECOND) {
    scale_tile(&low, params.alpha);
    scale_tile(&high, params.alpha);
    factor = 1.0;
    let end2 = select(0u, params.k2, inside);
    for (var k = 0u; k < end2; k += 16u) {
      workgroupBarrier();
      if (is_left) {
        let block = block_of(lane, !TRANSPOSE_A2);
        stage_left(block, params.alpha2 * a2_rows(tile_row + 4u * block.x, k + 4u * block.y));
      } else {
        let block = block_of(lane, TRANSPOSE_B2);
        stage_right(block, b2_columns(k + 4u * block.y, tile_column + 4u * block.x));
      }
      workgroupBarrier();
      multiply_step(&low, &high, row_block, column_block);
    }
  }
  if (inside) {
    let c_base = entry * params.m * params.n;
    let row = tile_row + 4u * row_block;
    let column = tile_column + 4u * column_block;
    store_tile(c_base, row, column, factor, low);
    if (LANES == 128u) { store_tile(c_base, row + 4u, column, factor, high); }
  }
}
