// The hidden numbers of feed-forward experts on software adapters, in the tiles of parts/subgroup_tile.wgsl:
//
//   gate[p] = Wg[e] xg[row(p)],  up[p] = Wu[e] xu[row(p)],  h[p] = f(gate[p]) up[p]     for the pairs p of every expert e
//   without GATED: h[p] = f(gate[p])
//
// Layouts       as in gated_experts.wgsl, whose entry point plan makes the table [offsets | order | the row that each place reads];
//               in and out are multiples of 4.
// Grid          one workgroup, which is one subgroup of 8, for a tile of 32 pairs x 32 outputs of both products; tiles of all segments,
//               an upper bound of them, times the tiles along out; folded into (x, y).

override GATED: bool = true;
override SHARED: bool = true;

struct Params {
  pairs: u32,
  rows: u32,
  experts: u32,
  segments: u32,
  out: u32,
  in: u32,
  share: u32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate_x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gate_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> up_x: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> up_weight: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read_write> h: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> gate: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> up: array<vec4<f32>>;

fn segment_start(expert: u32) -> u32 {
  return table[expert];
}

fn store(pair: u32, place: u32, end: u32, out: u32, g: vec4<f32>, u: vec4<f32>) {
  if ((place < end) & (out < params.out)) {
    let at = (pair * params.out + out) >> 2u;
    gate[at] = g;
    if (GATED) {
      up[at] = u;
      h[at] = activate(g) * u;
    } else {
      h[at] = activate(g);
    }
  }
}

fn store_rows(pairs: vec4<u32>, place: u32, end: u32, out: u32, g: mat4x4<f32>, u: mat4x4<f32>) {
  store(pairs.x, place, end, out, g[0], u[0]);
  store(pairs.y, place + 1u, end, out, g[1], u[1]);
  store(pairs.z, place + 2u, end, out, g[2], u[2]);
  store(pairs.w, place + 3u, end, out, g[3], u[3]);
}

@compute @workgroup_size(8)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, 32u);
  if (!tile.found) { return; }
  let out = (group % params.out_groups) * 32u + lane * 4u;
  let places = params.segments + 1u + min(tile.first + lane * 4u + vec4(0u, 1u, 2u, 3u), vec4(tile.end - 1u));
  let pairs = vec4(table[places.x], table[places.y], table[places.z], table[places.w]);
  let reads = places + params.pairs;
  var x_at = vec4(table[reads.x], table[reads.y], table[reads.z], table[reads.w]) * params.in;
  var w_at = (tile.expert * params.out + min(out, params.out - 4u) + vec4(0u, 1u, 2u, 3u)) * params.in;

  var g = Tile();
  var u = Tile();
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, params.in, tile.expert < params.experts);
  for (var i = 0u; i < end; i += 4u) {
    let x = mat4x4(gate_x[x_at.x >> 2u], gate_x[x_at.y >> 2u], gate_x[x_at.z >> 2u], gate_x[x_at.w >> 2u]);
    multiply_add(&g, x, transpose(mat4x4(gate_weight[w_at.x >> 2u], gate_weight[w_at.y >> 2u], gate_weight[w_at.z >> 2u],
      gate_weight[w_at.w >> 2u])));
    if (GATED) {
      let w = transpose(mat4x4(up_weight[w_at.x >> 2u], up_weight[w_at.y >> 2u], up_weight[w_at.z >> 2u], up_weight[w_at.w >> 2u]));
      if (SHARED) {
        multiply_add(&u, x, w);
      } else {
        multiply_add(&u, mat4x4(up_x[x_at.x >> 2u], up_x[x_at.y >> 2u], up_x[x_at.z >> 2u], up_x[x_at.w >> 2u]), w);
      }
    }
    x_at += 4u;
    w_at += 4u;
  }
  store_rows(subgroupBroadcast(pairs, 0u), tile.first, tile.end, out, g.q0, u.q0);
  store_rows(subgroupBroadcast(pairs, 1u), tile.first + 4u, tile.end, out, g.q1, u.q1);
  store_rows(subgroupBroadcast(pairs, 2u), tile.first + 8u, tile.end, out, g.q2, u.q2);
  store_rows(subgroupBroadcast(pairs, 3u), tile.first + 12u, tile.end, out, g.q3, u.q3);
  store_rows(subgroupBroadcast(pairs, 4u), tile.first + 16u, tile.end, out, g.q4, u.q4);
  store_rows(subgroupBroadcast(pairs, 5u), tile.first + 20u, tile.end, out, g.q5, u.q5);
  store_rows(subgroupBroadcast(pairs, 6u), tile.first + 24u, tile.end, out, g.q6, u.q6);
  store_rows(subgroupBroadcast(pairs, 7u), tile.first + 28u, tile.end, out, g.q7, u.q7);
}
