// The gradients of CoMoL's core matrices under a dense gate, and of a router that looks at the latents:
//
//   dM[e] = sum_t g[t, e] z[t] du[t]^T        dR[e] = sum_t dlogits[t, e] z[t]
//
// Layouts       z, du: [tokens, r];  gates, d_logits: [tokens, experts];  dM: [experts, r, r];  dR: [experts, r].
//               z and du are read as vec4s (ALIGNED: r is a multiple of 4), or element by element.
// Grid          LANES invocations a tile, of 4 x 4 of one expert's dM or (with_router) of 4 experts x 4 of dR: 16 multiply-adds for 2 vec4s.
//               E r^2 elements alone are too few invocations (128 for 8 experts of rank 16), so each of the LANES takes every
//               LANES-th token. WORKGROUP / LANES tiles a workgroup; folded into (x, y).
// Order         an invocation adds its tokens in their order, then a tree in workgroup memory adds up the invocations: no atomics, two
//               runs are equal bit for bit.

override WORKGROUP: u32 = 64u;
override LANES: u32 = 8u;
override ALIGNED: bool = true;

struct Params {
  tokens: u32,
  experts: u32,
  rank: u32,
  blocks: u32, // of 4 in a row
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> du: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gates: array<f32>;
@group(0) @binding(4) var<storage, read> d_logits: array<f32>;          // with_router only
@group(0) @binding(5) var<storage, read_write> d_core: array<f32>;
@group(0) @binding(6) var<storage, read_write> d_router: array<f32>;    // with_router only

// A tile's row each.
var<workgroup> tree_0: array<vec4<f32>, WORKGROUP>;
var<workgroup> tree_1: array<vec4<f32>, WORKGROUP>;
var<workgroup> tree_2: array<vec4<f32>, WORKGROUP>;
var<workgroup> tree_3: array<vec4<f32>, WORKGROUP>;

fn z_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = z[index >> 2u][index & 3u]; }
  return value;
}

fn du_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = du[index >> 2u][index & 3u]; }
  return value;
}

fn z_block(token: u32, i: u32) -> vec4<f32> {
  let at = token * params.rank + i;
  if (ALIGNED) { return z[at >> 2u]; }
  let rest = params.rank - i;
  return vec4(z_element(at, true), z_element(at + 1u, rest > 1u), z_element(at + 2u, rest > 2u), z_element(at + 3u, rest > 3u));
}

fn du_block(token: u32, j: u32) -> vec4<f32> {
  let at = token * params.rank + j;
  if (ALIGNED) { return du[at >> 2u]; }
  let rest = params.rank - j;
  return vec4(du_element(at, true), du_element(at + 1u, rest > 1u), du_element(at + 2u, rest > 2u), du_element(at + 3u, rest > 3u));
}

// Four experts' gradients of the logits, 0 past the last.
fn d_logit(token: u32, expert: u32) -> f32 {
  var value = 0.0;
  if (expert < params.experts) { value = d_logits[token * params.experts + expert]; }
  return value;
}

fn core_sum(tile: u32, start: u32, end: u32) -> mat4x4<f32> {
  let column = (tile % params.blocks) * 4u;
  let row = (tile / params.blocks % params.blocks) * 4u;
  let expert = tile / (params.blocks * params.blocks);
  var g0 = vec4(0.0);
  var g1 = vec4(0.0);
  var g2 = vec4(0.0);
  var g3 = vec4(0.0);
  for (var token = start; token < end; token += LANES) {
    let left = gates[token * params.experts + expert] * z_block(token, row);
    let right = du_block(token, column);
    g0 += left.x * right;
    g1 += left.y * right;
    g2 += left.z * right;
    g3 += left.w * right;
  }
  return mat4x4(g0, g1, g2, g3);
}

fn router_sum(tile: u32, start: u32, end: u32) -> mat4x4<f32> {
  let column = (tile % params.blocks) * 4u;
  let expert = tile / params.blocks * 4u;
  var g0 = vec4(0.0);
  var g1 = vec4(0.0);
  var g2 = vec4(0.0);
  var g3 = vec4(0.0);
  for (var token = start; token < end; token += LANES) {
    let right = z_block(token, column);
    g0 += d_logit(token, expert) * right;
    g1 += d_logit(token, expert + 1u) * right;
    g2 += d_logit(token, expert + 2u) * right;
    g3 += d_logit(token, expert + 3u) * right;
  }
  return mat4x4(g0, g1, g2, g3);
}

// The sum over the invocations of a tile, for the first of them. To be called by every invocation of the workgroup.
fn total(own: mat4x4<f32>, local: u32) -> mat4x4<f32> {
  var sum = own;
  for (var half = LANES / 2u; half > 0u; half /= 2u) {
    tree_0[local] = sum[0];
    tree_1[local] = sum[1];
    tree_2[local] = sum[2];
    tree_3[local] = sum[3];
    workgroupBarrier();
    if (local % LANES < half) {
      sum += mat4x4(tree_0[local + half], tree_1[local + half], tree_2[local + half], tree_3[local + half]);
    }
    workgroupBarrier();
  }
  return sum;
}

fn store_core_row(base: u32, row: u32, column: u32, v: vec4<f32>) {
  if (row < params.rank) {
    let at = base + row * params.rank + column;
    let rest = params.rank - column;
    d_core[at] = v.x;
    if (rest > 1u) { d_core[at + 1u] = v.y; }
    if (rest > 2u) { d_core[at + 2u] = v.z; }
    if (rest > 3u) { d_core[at + 3u] = v.w; }
  }
}

fn store_core(tile: u32, sum: mat4x4<f32>) {
  let column = (tile % params.blocks) * 4u;
  let row = (tile / params.blocks % params.blocks) * 4u;
  let base = tile / (params.blocks * params.blocks) * params.rank * params.rank;
  store_core_row(base, row, column, sum[0]);
  store_core_row(base, row + 1u, column, sum[1]);
  store_core_row(base, row + 2u, column, sum[2]);
  store_core_row(base, row + 3u, column, sum[3]);
}

fn store_router_row(expert: u32, column: u32, v: vec4<f32>) {
  if (expert < params.experts) {
    let at = expert * params.rank + column;
    let rest = params.rank - column;
    d_router[at] = v.x;
    if (rest > 1u) { d_router[at + 1u] = v.y; }
    if (rest > 2u) { d_router[at + 2u] = v.z; }
    if (rest > 3u) { d_router[at + 3u] = v.w; }
  }
}

fn store_router(tile: u32, sum: mat4x4<f32>) {
  let column = (tile % params.blocks) * 4u;
  let expert = tile / params.blocks * 4u;
  store_router_row(expert, column, sum[0]);
  store_router_row(expert + 1u, column, sum[1]);
  store_router_row(expert + 2u, column, sum[2]);
  store_router_row(expert + 3u, column, sum[3]);
}

@compute @workgroup_size(WORKGROUP)
fn core_only(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tiles = params.experts * params.blocks * params.blocks;
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * (WORKGROUP / LANES);
  if (first >= tiles) { return; }
  let tile = first + local / LANES;
  // Invocations past the last tile sum nothing, so that all meet the barriers.
  let sum = total(core_sum(min(tile, tiles - 1u), local % LANES, select(0u, params.tokens, tile < tiles)), local);
  if (tile < tiles && local % LANES == 0u) { store_core(tile, sum); }
}

@compute @workgroup_size(WORKGROUP)
fn with_router(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let core_tiles = params.experts * params.blocks * params.blocks;
  let tiles = core_tiles + (params.experts + 3u) / 4u * params.blocks;
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * (WORKGROUP / LANES);
  if (first >= tiles) { return; }
  let tile = first + local / LANES;
  let is_core = tile < core_tiles;
  // One of the two loops has no turns: a driver that runs both sides of a branch skips it.
  let core_end = select(0u, params.tokens, is_core);
  let router_end = select(params.tokens, 0u, is_core || tile >= tiles);
  let router_tile = select(min(tile, tiles - 1u) - core_tiles, 0u, is_core);
  let core_part = core_sum(min(tile, core_tiles - 1u), local % LANES, core_end);
  let sum = total(core_part + router_sum(router_tile, local % LANES, router_end), local);
  if (local % LANES == 0u) {
    if (is_core) {
      store_core(tile, sum);
    } else if (tile < tiles) {
      store_router(router_tile, sum);
    }
  }
}
