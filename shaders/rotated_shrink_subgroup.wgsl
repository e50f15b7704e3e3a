// Grouped shrink and the rotation of its rows in planes on software adapters, in the tiles of parts/subgroup_tile.wgsl: the formula and
// the layouts are those of rotated_shrink.wgsl.
//
// Grid          one workgroup, which is one subgroup of 8, for a tile of 32 pairs x 32 coordinates; tiles of all segments, an upper bound
//               of them, times the tiles along the rank; folded into (x, y).
// Work          a lane has the 4 coordinates of 2 planes, and the 2 angles of these: what is rotated never leaves its registers.

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

// As Tile, two columns a lane.
struct Angles {
  q0: mat4x2<f32>, q1: mat4x2<f32>, q2: mat4x2<f32>, q3: mat4x2<f32>,
  q4: mat4x2<f32>, q5: mat4x2<f32>, q6: mat4x2<f32>, q7: mat4x2<f32>,
}

fn add_angles(t: ptr<function, Angles>, rows: mat4x4<f32>, columns: mat4x2<f32>) {
  (*t).q0 += columns * mat4x4(subgroupBroadcast(rows[0], 0u), subgroupBroadcast(rows[1], 0u), subgroupBroadcast(rows[2], 0u), subgroupBroadcast(rows[3], 0u));
  (*t).q1 += columns * mat4x4(subgroupBroadcast(rows[0], 1u), subgroupBroadcast(rows[1], 1u), subgroupBroadcast(rows[2], 1u), subgroupBroadcast(rows[3], 1u));
  (*t).q2 += columns * mat4x4(subgroupBroadcast(rows[0], 2u), subgroupBroadcast(rows[1], 2u), subgroupBroadcast(rows[2], 2u), subgroupBroadcast(rows[3], 2u));
  (*t).q3 += columns * mat4x4(subgroupBroadcast(rows[0], 3u), subgroupBroadcast(rows[1], 3u), subgroupBroadcast(rows[2], 3u), subgroupBroadcast(rows[3], 3u));
  (*t).q4 += columns * mat4x4(subgroupBroadcast(rows[0], 4u), subgroupBroadcast(rows[1], 4u), subgroupBroadcast(rows[2], 4u), subgroupBroadcast(rows[3], 4u));
  (*t).q5 += columns * mat4x4(subgroupBroadcast(rows[0], 5u), subgroupBroadcast(rows[1], 5u), subgroupBroadcast(rows[2], 5u), subgroupBroadcast(rows[3], 5u));
  (*t).q6 += columns * mat4x4(subgroupBroadcast(rows[0], 6u), subgroupBroadcast(rows[1], 6u), subgroupBroadcast(rows[2], 6u), subgroupBroadcast(rows[3], 6u));
  (*t).q7 += columns * mat4x4(subgroupBroadcast(rows[0], 7u), subgroupBroadcast(rows[1], 7u), subgroupBroadcast(rows[2], 7u), subgroupBroadcast(rows[3], 7u));
}

fn segment_start(expert: u32) -> u32 {
  return offsets[expert];
}

fn store(pair: u32, place: u32, end: u32, out: u32, z: vec4<f32>, p: vec2<f32>) {
  let rotated = rotate_two(z, p);
  if ((place < end) & (out < params.rank)) {
    let at = (pair * params.rank + out) >> 2u;
    u[at] = rotated;
    angles[at] = p;
  }
}

fn store_rows(pairs: vec4<u32>, place: u32, end: u32, out: u32, z: mat4x4<f32>, p: mat4x2<f32>) {
  store(pairs.x, place, end, out, z[0], p[0]);
  store(pairs.y, place + 1u, end, out, z[1], p[1]);
  store(pairs.z, place + 2u, end, out, z[2], p[2]);
  store(pairs.w, place + 3u, end, out, z[3], p[3]);
}

@compute @workgroup_size(8)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, 32u);
  if (!tile.found) { return; }
  let out = (group % params.out_groups) * 32u + lane * 4u;
  let places = min(tile.first + lane * 4u + vec4(0u, 1u, 2u, 3u), vec4(tile.end - 1u));
  let pairs = vec4(order[places.x], order[places.y], order[places.z], order[places.w]);
  let column = tile.expert * params.rank + min(out, params.rank - 4u);
  // each by itself: see shrink_subgroup.wgsl
  let own_rows = vec4(pairs.x / params.share, pairs.y / params.share, pairs.z / params.share, pairs.w / params.share);
  var x_at = own_rows * params.in;
  var a_at = (column + vec4(0u, 1u, 2u, 3u)) * params.in;
  var v_at = (column / 2u + vec2(0u, 1u)) * params.in;

  var z = Tile();
  var p = Angles();
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, params.in, tile.expert < params.experts);
  for (var i = 0u; i < end; i += 4u) {
    let rows = mat4x4(x[x_at.x >> 2u], x[x_at.y >> 2u], x[x_at.z >> 2u], x[x_at.w >> 2u]);
    multiply_add(&z, rows, transpose(mat4x4(a[a_at.x >> 2u], a[a_at.y >> 2u], a[a_at.z >> 2u], a[a_at.w >> 2u])));
    add_angles(&p, rows, transpose(mat2x4(v[v_at.x >> 2u], v[v_at.y >> 2u])));
    x_at += 4u;
    a_at += 4u;
    v_at += 4u;
  }
  store_rows(subgroupBroadcast(pairs, 0u), tile.first, tile.end, out, z.q0, p.q0);
  store_rows(subgroupBroadcast(pairs, 1u), tile.first + 4u, tile.end, out, z.q1, p.q1);
  store_rows(subgroupBroadcast(pairs, 2u), tile.first + 8u, tile.end, out, z.q2, p.q2);
  store_rows(subgroupBroadcast(pairs, 3u), tile.first + 12u, tile.end, out, z.q3, p.q3);
  store_rows(subgroupBroadcast(pairs, 4u), tile.first + 16u, tile.end, out, z.q4, p.q4);
  store_rows(subgroupBroadcast(pairs, 5u), tile.first + 20u, tile.end, out, z.q5, p.q5);
  store_rows(subgroupBroadcast(pairs, 6u), tile.first + 24u, tile.end, out, z.q6, p.q6);
  store_rows(subgroupBroadcast(pairs, 7u), tile.first + 28u, tile.end, out, z.q7, p.q7);
}
