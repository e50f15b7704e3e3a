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
//               them, times the tiles along the rank; folded into (x, y).
// Work          x is read once for both products, and z never leaves registers: an invocation keeps 4 vec4s of it and 4 vec2s of
//               angles and goes through in by 4: 10 vec4 loads, 96 multiply-adds.

override LANES_PAIRS: u32 = 16u;
override LANES_OUT: u32 = 4u;

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

@compute @workgroup_size(LANES_OUT, LANES_PAIRS)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * 4u);
  let out = ((group % params.out_groups) * LANES_OUT + local.x) * 4u;
  let place = tile.first + local.y * 4u;
  if (!tile.found || out >= params.rank || place >= tile.end) { return; }

  let last = tile.end - 1u;
  let p0 = order[place];
  let p1 = order[min(place + 1u, last)];
  let p2 = order[min(place + 2u, last)];
  let p3 = order[min(place + 3u, last)];
  let width = params.in / 4u;
  let x0 = p0 / params.share * width;
  let x1 = p1 / params.share * width;
  let x2 = p2 / params.share * width;
  let x3 = p3 / params.share * width;
  let a_at = (tile.expert * params.rank + out) * width;
  let v_at = (tile.expert * params.rank + out) / 2u * width;

  var z0 = vec4(0.0);
  var z1 = vec4(0.0);
  var z2 = vec4(0.0);
  var z3 = vec4(0.0);
  var g0 = vec2(0.0);
  var g1 = vec2(0.0);
  var g2 = vec2(0.0);
  var g3 = vec2(0.0);
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, width, tile.expert < params.experts);
  for (var i = 0u; i < end; i++) {
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
  store(p0, out, true, z0, g0);
  store(p1, out, place + 1u < tile.end, z1, g1);
  store(p2, out, place + 2u < tile.end, z2, g2);
  store(p3, out, place + 3u < tile.end, z3, g3);
}
