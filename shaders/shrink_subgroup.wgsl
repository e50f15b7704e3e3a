// Grouped products on software adapters, in the tiles of parts/subgroup_tile.wgsl:
//
//   z[p, :] = W[e] x[p / share, :]     for the pairs p of every expert e
//   TWO:      + W2[e] x2[p, :]
//
// Layouts       x: [rows, in];  weight: [experts, out, in] (OUT_IN) or [experts, in, out], and of the second product alike;  order: pairs
//               sorted by expert;  offsets: where each segment's pairs start;  z: [pairs, out], by pair.  in, in2 and out are multiples
//               of 4. There may be one segment more than experts: its pairs belong to none and get zeros.
// Grid          one workgroup, which is one subgroup of 8, for a tile of 32 pairs x 32 outputs; tiles of all segments, an upper bound of
//               them, times the tiles along out; folded into (x, y).

override OUT_IN: bool = true;
override TWO: bool = false;

struct Params {
  experts: u32,
  segments: u32,
  out: u32,
  in: u32,
  share: u32,
  in2: u32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> z: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> x2: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> weight2: array<vec4<f32>>;

fn segment_start(expert: u32) -> u32 {
  return offsets[expert];
}

// Where the lane's block of a matrix [out, in] or [in, out] starts: four of its outputs, or four of in.
fn weight_at(base: u32, out: u32, in: u32) -> vec4<u32> {
  if (OUT_IN) { return base + (min(out, params.out - 4u) + vec4(0u, 1u, 2u, 3u)) * in; }
  return base + min(out, params.out - 4u) + vec4(0u, 1u, 2u, 3u) * params.out;
}

fn weight_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(weight[at.x >> 2u], weight[at.y >> 2u], weight[at.z >> 2u], weight[at.w >> 2u]);
  if (OUT_IN) { return transpose(block); }
  return block;
}

fn weight2_block(at: vec4<u32>) -> mat4x4<f32> {
  let block = mat4x4(weight2[at.x >> 2u], weight2[at.y >> 2u], weight2[at.z >> 2u], weight2[at.w >> 2u]);
  if (OUT_IN) { return transpose(block); }
  return block;
}

fn store(pair: u32, place: u32, end: u32, out: u32, value: vec4<f32>) {
  if ((place < end) & (out < params.out)) { z[(pair * params.out + out) >> 2u] = value; }
}

fn store_rows(pairs: vec4<u32>, place: u32, end: u32, out: u32, q: mat4x4<f32>) {
  store(pairs.x, place, end, out, q[0]);
  store(pairs.y, place + 1u, end, out, q[1]);
  store(pairs.z, place + 2u, end, out, q[2]);
  store(pairs.w, place + 3u, end, out, q[3]);
}

@compute @workgroup_size(8)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, 32u);
  if (!tile.found) { return; }
  let out = (group % params.out_groups) * 32u + lane * 4u;
  let places = min(tile.first + lane * 4u + vec4(0u, 1u, 2u, 3u), vec4(tile.end - 1u));
  let pairs = vec4(order[places.x], order[places.y], order[places.z], order[places.w]);

  var t = Tile();
  // no turn of the loops for pairs of no expert: they keep their zeros, and no weight is read
  let real = tile.expert < params.experts;
  // each by itself: of a vector's division some translators make what Metal refuses
  let rows = vec4(pairs.x / params.share, pairs.y / params.share, pairs.z / params.share, pairs.w / params.share);
  var x_at = rows * params.in;
  var w_at = weight_at(tile.expert * params.out * params.in, out, params.in);
  let w_step = select(4u * params.out, 4u, OUT_IN);
  let end = select(0u, params.in, real);
  for (var i = 0u; i < end; i += 4u) {
    multiply_add(&t, mat4x4(x[x_at.x >> 2u], x[x_at.y >> 2u], x[x_at.z >> 2u], x[x_at.w >> 2u]), weight_block(w_at));
    x_at += 4u;
    w_at += w_step;
  }
  if (TWO) {
    x_at = pairs * params.in2;
    w_at = weight_at(tile.expert * params.out * params.in2, out, params.in2);
    let end2 = select(0u, params.in2, real);
    for (var i = 0u; i < end2; i += 4u) {
      multiply_add(&t, mat4x4(x2[x_at.x >> 2u], x2[x_at.y >> 2u], x2[x_at.z >> 2u], x2[x_at.w >> 2u]), weight2_block(w_at));
      x_at += 4u;
      w_at += w_step;
    }
  }
  store_rows(subgroupBroadcast(pairs, 0u), tile.first, tile.end, out, t.q0);
  store_rows(subgroupBroadcast(pairs, 1u), tile.first + 4u, tile.end, out, t.q1);
  store_rows(subgroupBroadcast(pairs, 2u), tile.first + 8u, tile.end, out, t.q2);
  store_rows(subgroupBroadcast(pairs, 3u), tile.first + 12u, tile.end, out, t.q3);
  store_rows(subgroupBroadcast(pairs, 4u), tile.first + 16u, tile.end, out, t.q4);
  store_rows(subgroupBroadcast(pairs, 5u), tile.first + 20u, tile.end, out, t.q5);
  store_rows(subgroupBroadcast(pairs, 6u), tile.first + 24u, tile.end, out, t.q6);
  store_rows(subgroupBroadcast(pairs, 7u), tile.first + 28u, tile.end, out, t.q7);
}
