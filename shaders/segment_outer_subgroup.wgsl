// Weight gradients by expert segment on software adapters, in the tiles of parts/subgroup_tile.wgsl:
//
//   one   dW[e] = scale sum over the pairs p of e of g[p] left[p / left_share] right[p / right_share]^T
//   two   the same for two left operands that meet the same right one, without g: each has its own result
//
// Layouts       left: [rows, a];  right: [rows, b];  order: pairs sorted by expert;  offsets: where each expert's pairs start;
//               gates: [pairs] (GATED, else 1);  dW: [experts, a, b].  rows: the row of right that a pair reads (MAPPED), in place of
//               p / right_share.  a and b are multiples of 4. A segment after those of the experts belongs to none, and is not read.
// Grid          one workgroup, which is one subgroup of 8, for a tile of 32 x 32 of one expert's gradient; folded into (x, y). In two,
//               the tiles along left2 follow those along left.
// Work          a workgroup walks its expert's pairs in sorted order, four at a time: no atomics, and the order of the sum is always
//               the same.

override GATED: bool = true;
override MAPPED: bool = false;

struct Params {
  experts: u32,
  left: u32,
  right: u32,
  left_share: u32,
  right_share: u32,
  right_rows: u32,
  scale: f32,
  left2: u32,
  left_groups: u32,
  left2_groups: u32,
  right_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> right: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read> gates: array<f32>;                   // one only
@group(0) @binding(6) var<storage, read_write> gradient: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> rows: array<u32>;                    // one only
@group(0) @binding(8) var<storage, read> left2: array<vec4<f32>>;             // two only
@group(0) @binding(9) var<storage, read_write> gradient2: array<vec4<f32>>;   // two only

// The same for all lanes, of which nothing else would be known to take part in a broadcast.
struct Place {
  inside: bool,
  expert: u32,
  left_group: u32,
  first_column: u32,
}

fn place_of(workgroup: vec3<u32>) -> Place {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let rest = group / params.right_groups;
  let groups = params.left_groups + params.left2_groups;
  let expert = rest / groups;
  return Place(expert < params.experts, expert, rest % groups, (group % params.right_groups) * 32u);
}

// Four pairs of the order from a place on; those past the last are the last, and count for nothing.
fn pairs_at(place: u32, last: u32, lane: u32) -> vec4<u32> {
  let mine = order[min(place + (lane & 3u), last)];
  return vec4(subgroupBroadcast(mine, 0u), subgroupBroadcast(mine, 1u), subgroupBroadcast(mine, 2u), subgroupBroadcast(mine, 3u));
}

// Each by itself: see shrink_subgroup.wgsl.
fn rows_of(pairs: vec4<u32>, share: u32) -> vec4<u32> {
  return vec4(pairs.x / share, pairs.y / share, pairs.z / share, pairs.w / share);
}

fn counted(place: u32, last: u32) -> vec4<f32> {
  return select(vec4(0.0), vec4(params.scale), vec4(place) + vec4(0u, 1u, 2u, 3u) <= vec4(last));
}

fn right_block(at: vec4<u32>, factor: vec4<f32>) -> mat4x4<f32> {
  return mat4x4(factor.x * right[at.x >> 2u], factor.y * right[at.y >> 2u], factor.z * right[at.z >> 2u], factor.w * right[at.w >> 2u]);
}

@compute @workgroup_size(8)
fn one(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let p = place_of(workgroup);
  let lane_column = p.first_column + lane * 4u;
  if (!p.inside) { return; }
  let row = min(p.left_group * 32u + lane * 4u, params.left - 4u);
  let column = min(lane_column, params.right - 4u);
  var t = Tile();
  let first = offsets[p.expert];
  let end = offsets[p.expert + 1u];
  for (var place = first; place < end; place += 4u) {
    let pairs = pairs_at(place, end - 1u, lane);
    var factor = counted(place, end - 1u);
    if (GATED) {
      let gate = gates[order[min(place + (lane & 3u), end - 1u)]];
      factor *= vec4(subgroupBroadcast(gate, 0u), subgroupBroadcast(gate, 1u), subgroupBroadcast(gate, 2u), subgroupBroadcast(gate, 3u));
    }
    let left_at = rows_of(pairs, params.left_share) * params.left + row;
    var right_row = rows_of(pairs, params.right_share);
    if (MAPPED) {
      let mapped = min(rows[order[min(place + (lane & 3u), end - 1u)]], params.right_rows - 1u);
      right_row = vec4(subgroupBroadcast(mapped, 0u), subgroupBroadcast(mapped, 1u), subgroupBroadcast(mapped, 2u), subgroupBroadcast(mapped, 3u));
    }
    let block = mat4x4(left[left_at.x >> 2u], left[left_at.y >> 2u], left[left_at.z >> 2u], left[left_at.w >> 2u]);
    multiply_add(&t, transpose(block), right_block(right_row * params.right + column, factor));
  }
  store_tile(p.expert, p.left_group * 32u, lane_column, t);
}

@compute @workgroup_size(8)
fn two(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let p = place_of(workgroup);
  let lane_column = p.first_column + lane * 4u;
  if (!p.inside) { return; }
  let column = min(lane_column, params.right - 4u);
  let second = p.left_group >= params.left_groups;
  let first_row = select(p.left_group, p.left_group - params.left_groups, second) * 32u;
  let row = min(first_row + lane * 4u, select(params.left, params.left2, second) - 4u);
  var t = Tile();
  let first = offsets[p.expert];
  let end = offsets[p.expert + 1u];
  // two loops and no branch in one: a software adapter runs both sides of a branch, but no loop of zero turns
  for (var place = select(first, end, second); place < end; place += 4u) {
    let pairs = pairs_at(place, end - 1u, lane);
    let at = rows_of(pairs, params.left_share) * params.left + row;
    let block = mat4x4(left[at.x >> 2u], left[at.y >> 2u], left[at.z >> 2u], left[at.w >> 2u]);
    multiply_add(&t, transpose(block), right_block(rows_of(pairs, params.right_share) * params.right + column, counted(place, end - 1u)));
  }
  for (var place = select(end, first, second); place < end; place += 4u) {
    let pairs = pairs_at(place, end - 1u, lane);
    let at = rows_of(pairs, params.left_share) * params.left2 + row;
    let block = mat4x4(left2[at.x >> 2u], left2[at.y >> 2u], left2[at.z >> 2u], left2[at.w >> 2u]);
    multiply_add(&t, transpose(block), right_block(rows_of(pairs, params.right_share) * params.right + column, counted(place, end - 1u)));
  }
  if (second) { store_tile2(p.expert, first_row, lane_column, t); } else { store_tile(p.expert, first_row, lane_column, t); }
}

fn store(expert: u32, row: u32, column: u32, value: vec4<f32>) {
  if ((row < params.left) & (column < params.right)) { gradient[((expert * params.left + row) * params.right + column) >> 2u] = value; }
}

fn store_rows(expert: u32, row: u32, column: u32, q: mat4x4<f32>) {
  store(expert, row, column, q[0]);
  store(expert, row + 1u, column, q[1]);
  store(expert, row + 2u, column, q[2]);
  store(expert, row + 3u, column, q[3]);
}

fn store_tile(expert: u32, row: u32, column: u32, t: Tile) {
  store_rows(expert, row, column, t.q0);
  store_rows(expert, row + 4u, column, t.q1);
  store_rows(expert, row + 8u, column, t.q2);
  store_rows(expert, row + 12u, column, t.q3);
  store_rows(expert, row + 16u, column, t.q4);
  store_rows(expert, row + 20u, column, t.q5);
  store_rows(expert, row + 24u, column, t.q6);
  store_rows(expert, row + 28u, column, t.q7);
}

fn store2(expert: u32, row: u32, column: u32, value: vec4<f32>) {
  if ((row < params.left2) & (column < params.right)) { gradient2[((expert * params.left2 + row) * params.right + column) >> 2u] = value; }
}

fn store_rows2(expert: u32, row: u32, column: u32, q: mat4x4<f32>) {
  store2(expert, row, column, q[0]);
  store2(expert, row + 1u, column, q[1]);
  store2(expert, row + 2u, column, q[2]);
  store2(expert, row + 3u, column, q[3]);
}

fn store_tile2(expert: u32, row: u32, column: u32, t: Tile) {
  store_rows2(expert, row, column, t.q0);
  store_rows2(expert, row + 4u, column, t.q1);
  store_rows2(expert, row + 8u, column, t.q2);
  store_rows2(expert, row + 12u, column, t.q3);
  store_rows2(expert, row + 16u, column, t.q4);
  store_rows2(expert, row + 20u, column, t.q5);
  store_rows2(expert, row + 24u, column, t.q6);
  store_rows2(expert, row + 28u, column, t.q7);
}
