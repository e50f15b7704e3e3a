// The gradient of CoMoL's core matrices under a dense gate:   dM[e] = sum_t g[t, e] z[t] du[t]^T
//
//   chunk       partial[c, e] = the sum over the tokens of chunk c (with one chunk: dM itself)
//   total       dM = sum_c partial[c], in the order of the chunks
//
// Layouts       z, du: [tokens, r];  gates: [tokens, experts];  partial: [chunks, experts, r, r];  dM: [experts, r, r].
//               z and du are read as vec4s (ALIGNED: r is a multiple of 4), or element by element.
// Grid          chunk: one invocation a tile of 4 x 4 of one expert in one chunk of tokens: 16 multiply-adds for 2 vec4s read. E r^2
//               elements alone are too few invocations (128 for 8 experts of rank 16): the tokens are split until there are enough.
//               total: one invocation an element. Folded into (x, y).
// Order         a chunk's tokens are added in their order, then the chunks in theirs: no atomics, two runs are equal bit for bit.

override WORKGROUP: u32 = 64u;
override ALIGNED: bool = true;

struct Params {
  tokens: u32,
  experts: u32,
  rank: u32,
  blocks: u32, // of 4 in a row
  chunk: u32,  // tokens in one
  chunks: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> du: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gates: array<f32>;
@group(0) @binding(4) var<storage, read> partial: array<f32>;          // total only
@group(0) @binding(5) var<storage, read_write> gradient: array<f32>;   // chunk: partial or dM, total: dM

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

fn store_row(base: u32, row: u32, column: u32, v: vec4<f32>) {
  if (row < params.rank) {
    let at = base + row * params.rank + column;
    let rest = params.rank - column;
    gradient[at] = v.x;
    if (rest > 1u) { gradient[at + 1u] = v.y; }
    if (rest > 2u) { gradient[at + 2u] = v.z; }
    if (rest > 3u) { gradient[at + 3u] = v.w; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn chunk(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tile = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let column = (tile % params.blocks) * 4u;
  let row = (tile / params.blocks % params.blocks) * 4u;
  let matrix = tile / (params.blocks * params.blocks); // of chunk and expert
  if (matrix >= params.chunks * params.experts) { return; }
  let expert = matrix % params.experts;
  let start = matrix / params.experts * params.chunk;
  let end = min(start + params.chunk, params.tokens);
  var g0 = vec4(0.0);
  var g1 = vec4(0.0);
  var g2 = vec4(0.0);
  var g3 = vec4(0.0);
  for (var token = start; token < end; token++) {
    let left = gates[token * params.experts + expert] * z_block(token, row);
    let right = du_block(token, column);
    g0 += left.x * right;
    g1 += left.y * right;
    g2 += left.z * right;
    g3 += left.w * right;
  }
  let base = matrix * params.rank * params.rank;
  store_row(base, row, column, g0);
  store_row(base, row + 1u, column, g1);
  store_row(base, row + 2u, column, g2);
  store_row(base, row + 3u, column, g3);
}

@compute @workgroup_size(WORKGROUP)
fn total(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let elements = params.experts * params.rank * params.rank;
  if (element >= elements) { return; }
  var sum = 0.0;
  for (var c = 0u; c < params.chunks; c++) { sum += partial[c * elements + element]; }
  gradient[element] = sum;
}
