// Grouped shrink and the rotation of its rows in planes, in one kernel:
//
//   z = A[e] x[p / share, :],   angles[p, :] = V[e] x[p / share, :]     for the pairs p of every expert e
//   u[p, 2i] = cos angles[p, i] z[2i] - sin angles[p, i] z[2i+1],   u[p, 2i+1] = sin angles[p, i] z[2i] + cos angles[p, i] z[2i+1]
//
// An angle of 0 copies the two: see rotate_planes.wgsl.
//
// Layouts       x: [rows, in];  a: [experts, rank, in];  v: [experts, rank / 2, in];  order: pairs sorted by expert;  offsets: where each
//               segment's pairs start;  u: [pairs, rank], angles: [pairs, rank / 2], by pair.  in and rank are multiples of 4. There may
//               be one segment more than experts: its pairs belong to none and get zeros.
// Grid          one workgroup for LANES_PAIRS x LANES_OUT tiles of 4 pairs x 4 coordinates; tiles of all segments, an upper bound of
//               them, times the tiles along the rank; folded into (x, y). split: LANES_K invocations a tile, for few results and a
//               long in.
// Work          x is read once for both products, and z never leaves registers: an invocation keeps 4 vec4s of it and 4 vec2s of
//               angles and goes through in by 4: 10 vec4 loads, 96 multiply-adds. split: an invocation takes every LANES_K-th four of in, so
//               that neighbours read one stretch of memory; a tile's are summed by halves in workgroup memory, always in the same order.

override LANES_PAIRS: u32 = 16u;
override LANES_OUT: u32 = 4u;
override LANES_K: u32 = 1u; // split only

struct Params {
  experts: u32,
  segments: u32,
  rank: u32,
  in: u32,
  share: u32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> order: array<u32>;
@group(0) @binding(5) var<storage, read> offsets: array<u32>;
@group(0) @binding(6) var<storage, read_write> u: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> angles: array<vec2<f32>>;

// split only
var<workgroup> sums: array<vec4<f32>, LANES_PAIRS * LANES_OUT * LANES_K * 4u>;
var<workgroup> angle_sums: array<vec2<f32>, LANES_PAIRS * LANES_OUT * LANES_K * 4u>;

fn segment_start(expert: u32) -> u32 {
  return offsets[expert];
}

fn store(pair: u32, out: u32, inside: bool, z: vec4<f32>, p: vec2<f32>) {
  if (inside) {
    let at = pair * params.rank + out;
    angles[at >> 2u] = p;
    u[at >> 2u] = rotate_two(z, p);
  }
}

// The pairs at four places of the sorted order, none behind the last.
fn pairs_at(place: u32, last: u32) -> vec4<u32> {
  return vec4(order[min(place, last)], order[min(place + 1u, last)], order[min(place + 2u, last)], order[min(place + 3u, last)]);
}

// Of each pair, what is to be rotated and by which angles.
struct Rows {
  z: mat4x4<f32>,
  p: mat4x2<f32>,
}

// Over every step-th four of in from `first` to `end`.
fn product(pairs: vec4<u32>, expert: u32, out: u32, first: u32, end: u32, step: u32) -> Rows {
  let width = params.in / 4u;
  let x0 = pairs.x / params.share * width;
  let x1 = pairs.y / params.share * width;
  let x2 = pairs.z / params.share * width;
  let x3 = pairs.w / params.share * width;
  let a_at = (expert * params.rank + out) * width;
  let v_at = (expert * params.rank + out) / 2u * width;

  var z0 = vec4(0.0);
  var z1 = vec4(0.0);
  var z2 = vec4(0.0);
  var z3 = vec4(0.0);
  var g0 = vec2(0.0);
  var g1 = vec2(0.0);
  var g2 = vec2(0.0);
  var g3 = vec2(0.0);
  for (var i = first; i < end; i += step) {
    let w = transpose(mat4x4(a[a_at + i], a[a_at + width + i], a[a_at + 2u * width + i], a[a_at + 3u * width + i]));
    let r = transpose(mat2x4(v[v_at + i], v[v_at + width + i]));
    let b0 = x[x0 + i];
    let b1 = x[x1 + i];
    let b2 = x[x2 + i];
    let b3 = x[x3 + i];
    z0 += w * b0;
    z1 += w * b1;
    z2 += w * b2;
    z3 += w * b3;
    g0 += r * b0;
    g1 += r * b1;
    g2 += r * b2;
    g3 += r * b3;
  }
  return Rows(mat4x4(z0, z1, z2, z3), mat4x2(g0, g1, g2, g3));
}

@compute @workgroup_size(LANES_OUT, LANES_PAIRS)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * 4u);
  let out = ((group % params.out_groups) * LANES_OUT + local.x) * 4u;
  let place = tile.first + local.y * 4u;
  if (!tile.found || out >= params.rank || place >= tile.end) { return; }

  let pairs = pairs_at(place, tile.end - 1u);
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, params.in / 4u, tile.expert < params.experts);
  let rows = product(pairs, tile.expert, out, 0u, end, 1u);
  store(pairs.x, out, true, rows.z[0], rows.p[0]);
  store(pairs.y, out, place + 1u < tile.end, rows.z[1], rows.p[1]);
  store(pairs.z, out, place + 2u < tile.end, rows.z[2], rows.p[2]);
  store(pairs.w, out, place + 3u < tile.end, rows.z[3], rows.p[3]);
}

fn add_row(to: u32, other: u32) {
  sums[to] += sums[other];
  angle_sums[to] += angle_sums[other];
}

@compute @workgroup_size(LANES_K, LANES_OUT, LANES_PAIRS)
fn split(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>,
  @builtin(local_invocation_index) index: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * 4u);
  let out = ((group % params.out_groups) * LANES_OUT + local.y) * 4u;
  let place = tile.first + local.z * 4u;
  let inside = tile.found && out < params.rank && place < tile.end;
  let last = select(0u, tile.end - 1u, tile.found);
  // no turn of the loop for those outside, nor for pairs of no expert
  let end = select(0u, params.in / 4u, inside && tile.expert < params.experts);
  let rows = product(pairs_at(place, last), tile.expert, out, local.x, end, LANES_K);

  let lanes = LANES_PAIRS * LANES_OUT * LANES_K;
  sums[index] = rows.z[0];
  sums[index + lanes] = rows.z[1];
  sums[index + 2u * lanes] = rows.z[2];
  sums[index + 3u * lanes] = rows.z[3];
  angle_sums[index] = rows.p[0];
  angle_sums[index + lanes] = rows.p[1];
  angle_sums[index + 2u * lanes] = rows.p[2];
  angle_sums[index + 3u * lanes] = rows.p[3];
  workgroupBarrier();
  for (var reach = LANES_K / 2u; reach > 0u; reach = reach / 2u) {
    if (local.x < reach) {
      let other = index + reach;
      add_row(index, other);
      add_row(index + lanes, other + lanes);
      add_row(index + 2u * lanes, other + 2u * lanes);
      add_row(index + 3u * lanes, other + 3u * lanes);
    }
    workgroupBarrier();
  }
  // the tile's invocations share its pairs
  for (var r = local.x; r < 4u; r += LANES_K) {
    let at = index - local.x + r * lanes;
    store(order[min(place + r, last)], out, inside && place + r < tile.end, sums[at], angle_sums[at]);
  }
}
