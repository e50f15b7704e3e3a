// Grouped shrink:   z[p, :] = W[e] x[p / share, :]    for the pairs p of every expert e
//
// Layouts       x: [rows, in];  weight: [experts, out, in] (OUT_IN) or [experts, in, out];  order: pairs sorted by expert;
//               offsets: where each segment's pairs start;  z: [pairs, out], in the order of the pairs, not the sorted one.
//               There may be one segment more than experts: its pairs belong to none and get zeros.
//               x and weight are read as vec4s (ALIGNED: every row starts at a multiple of 4), or element by element.
// Grid          one workgroup for LANES_PAIRS x LANES_OUT tiles of 4 pairs x 4 outputs; tiles of all segments, an upper bound of
//               them, times the tiles along out; folded into (x, y). split: LANES_K invocations a tile, for few results and a long in.
// Work          an invocation keeps 4 named vec4s and goes through in by 4: 8 vec4 loads, 64 multiply-adds. Rows past the end of
//               the segment or of out are read as the last one inside and not stored. split: an invocation takes every LANES_K-th
//               four of in, so that neighbours read one stretch of memory; a tile's are summed by halves in workgroup memory, always
//               in the same order.

override LANES_PAIRS: u32 = 16u;
override LANES_OUT: u32 = 4u;
override LANES_K: u32 = 1u; // split only
override OUT_IN: bool = true;
override ALIGNED: bool = true;

struct Params {
  experts: u32,
  segments: u32,
  out: u32,
  in: u32,
  share: u32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;

var<workgroup> sums: array<vec4<f32>, LANES_PAIRS * LANES_OUT * LANES_K * 4u>; // split only

fn segment_start(expert: u32) -> u32 {
  return offsets[expert];
}

fn x_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = x[index >> 2u][index & 3u]; }
  return value;
}

fn weight_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = weight[index >> 2u][index & 3u]; }
  return value;
}

// Elements i..i+4 of a row of x.
fn x_block(row: u32, i: u32) -> vec4<f32> {
  let at = row * params.in + i;
  if (ALIGNED) { return x[at >> 2u]; }
  let left = params.in - i;
  return vec4(x_element(at, true), x_element(at + 1u, left > 1u), x_element(at + 2u, left > 2u), x_element(at + 3u, left > 3u));
}

// Elements j..j+4 of a stored row of a matrix, the row being width wide.
fn weight_block(base: u32, row: u32, j: u32, width: u32, inside: bool) -> vec4<f32> {
  let at = base + row * width + j;
  if (ALIGNED) { return weight[at >> 2u]; }
  return vec4(weight_element(at, inside), weight_element(at + 1u, inside & (j + 1u < width)),
    weight_element(at + 2u, inside & (j + 2u < width)), weight_element(at + 3u, inside & (j + 3u < width)));
}

fn store(pair: u32, out: u32, inside: bool, value: vec4<f32>) {
  if (inside) {
    let at = pair * params.out + out;
    let left = params.out - out;
    z[at] = value.x;
    if (left > 1u) { z[at + 1u] = value.y; }
    if (left > 2u) { z[at + 2u] = value.z; }
    if (left > 3u) { z[at + 3u] = value.w; }
  }
}

// The pairs at four places of the sorted order, none behind the last.
fn pairs_at(place: u32, last: u32) -> vec4<u32> {
  return vec4(order[min(place, last)], order[min(place + 1u, last)], order[min(place + 2u, last)], order[min(place + 3u, last)]);
}

// A row for each pair, over every step-th element of in from `first` to `end`, four at once.
fn product(pairs: vec4<u32>, expert: u32, out: u32, first: u32, end: u32, step: u32) -> mat4x4<f32> {
  let x0 = pairs.x / params.share;
  let x1 = pairs.y / params.share;
  let x2 = pairs.z / params.share;
  let x3 = pairs.w / params.share;
  let base = expert * params.out * params.in;
  let last_out = params.out - 1u;
  let o1 = min(out + 1u, last_out);
  let o2 = min(out + 2u, last_out);
  let o3 = min(out + 3u, last_out);

  var z0 = vec4(0.0);
  var z1 = vec4(0.0);
  var z2 = vec4(0.0);
  var z3 = vec4(0.0);
  for (var i = first; i < end; i += step) {
    // four rows along in, each four outputs wide
    var w: mat4x4<f32>;
    if (OUT_IN) {
      w = transpose(mat4x4(weight_block(base, out, i, params.in, true), weight_block(base, o1, i, params.in, true),
        weight_block(base, o2, i, params.in, true), weight_block(base, o3, i, params.in, true)));
    } else {
      w = mat4x4(weight_block(base, i, out, params.out, true), weight_block(base, i + 1u, out, params.out, i + 1u < params.in),
        weight_block(base, i + 2u, out, params.out, i + 2u < params.in),
        weight_block(base, i + 3u, out, params.out, i + 3u < params.in));
    }
    z0 += w * x_block(x0, i);
    z1 += w * x_block(x1, i);
    z2 += w * x_block(x2, i);
    z3 += w * x_block(x3, i);
  }
  return mat4x4(z0, z1, z2, z3);
}

@compute @workgroup_size(LANES_OUT, LANES_PAIRS)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * 4u);
  let out = ((group % params.out_groups) * LANES_OUT + local.x) * 4u;
  let place = tile.first + local.y * 4u;
  if (!tile.found || out >= params.out || place >= tile.end) { return; }

  let pairs = pairs_at(place, tile.end - 1u);
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, params.in, tile.expert < params.experts);
  let rows = product(pairs, tile.expert, out, 0u, end, 4u);
  store(pairs.x, out, true, rows[0]);
  store(pairs.y, out, place + 1u < tile.end, rows[1]);
  store(pairs.z, out, place + 2u < tile.end, rows[2]);
  store(pairs.w, out, place + 3u < tile.end, rows[3]);
}

@compute @workgroup_size(LANES_K, LANES_OUT, LANES_PAIRS)
fn split(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>,
  @builtin(local_invocation_index) index: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * 4u);
  let out = ((group % params.out_groups) * LANES_OUT + local.y) * 4u;
  let place = tile.first + local.z * 4u;
  let inside = tile.found && out < params.out && place < tile.end;
  let last = select(0u, tile.end - 1u, tile.found);
  // no turn of the loop for those outside, nor for pairs of no expert
  let end = select(0u, params.in, inside && tile.expert < params.experts);
  let rows = product(pairs_at(place, last), tile.expert, out, local.x * 4u, end, LANES_K * 4u);

  let lanes = LANES_PAIRS * LANES_OUT * LANES_K;
  sums[index] = rows[0];
  sums[index + lanes] = rows[1];
  sums[index + 2u * lanes] = rows[2];
  sums[index + 3u * lanes] = rows[3];
  workgroupBarrier();
  for (var reach = LANES_K / 2u; reach > 0u; reach = reach / 2u) {
    if (local.x < reach) {
      let other = index + reach;
      sums[index] += sums[other];
      sums[index + lanes] += sums[other + lanes];
      sums[index + 2u * lanes] += sums[other + 2u * lanes];
      sums[index + 3u * lanes] += sums[other + 3u * lanes];
    }
    workgroupBarrier();
  }
  // the tile's invocations share its pairs
  for (var r = local.x; r < 4u; r += LANES_K) {
    store(order[min(place + r, last)], out, inside && place + r < tile.end, sums[index - local.x + r * lanes]);
  }
}
