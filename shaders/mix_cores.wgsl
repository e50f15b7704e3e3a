// CoMoL's mixture of core matrices. For a token with gates g over its slots, and the expert e of each slot:
//
//   apply       u[j] = sum over the slots of g M[e]^T z:   (sum_i M[e][i, j] z[i]) for one expert after another
//   merge       u[j] = sum_i C[i, j] z[i],   C[i, j] = sum over the slots of g M[e][i, j]:   4 elements of C at a time, in registers
//   backward    w = M[e] du for every slot;   dz = sum over the slots of g w;   dg = <z, w>
//
//               apply and merge are one triple sum in two orders, with the same r^2 multiply-adds a slot; apply scales r numbers a
//               slot by a gate, merge applies r^2 merged ones a token. In neither is a token's matrix written to memory.
//
// Layouts       z, u, du, dz: [tokens, r];  core: [experts, r, r];  gates, dg: [tokens, slots];
//               chosen: [tokens, slots] (ROUTED), else slot and expert are the same. An expert past the last is skipped: its part of
//               u and dz is 0, its dg is 0.
//               z, core and du are read as vec4s (ALIGNED: r is a multiple of 4), or element by element.
// Grid          apply, merge: one invocation for 4 elements of a token's u, the _four ones for those of 4 tokens, which read an
//               expert's matrix once for all of them: 8 vec4s for 64 multiply-adds in place of 5 for 16. For a dense gate alone.
//               backward: one workgroup for WORKGROUP / LANES tokens. The LANES invocations of a token have 4 rows of w each (again
//               and again, if r > 4 LANES) and leave their parts of dg in workgroup memory, for CHUNK slots between two barriers;
//               then one invocation adds up the parts of a slot, in the order of the rows. backward_four: 4 tokens in place of 1.
//               Folded into (x, y).

override WORKGROUP: u32 = 64u;
override LANES: u32 = 4u;
override ROUTED: bool = false;
override ALIGNED: bool = true;

const CHUNK = 16u;
const CHUNK_FOUR = 8u;

struct Params {
  tokens: u32,
  slots: u32,
  experts: u32,
  rank: u32,
  blocks: u32, // of 4 in a row
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> core: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gates: array<f32>;
@group(0) @binding(4) var<storage, read> chosen: array<u32>;
@group(0) @binding(5) var<storage, read> du: array<vec4<f32>>;           // backward only
@group(0) @binding(6) var<storage, read_write> out_rows: array<f32>;     // apply, merge: u, backward: dz
@group(0) @binding(7) var<storage, read_write> d_gates: array<f32>;      // backward only

var<workgroup> parts: array<f32, CHUNK * WORKGROUP>;
var<workgroup> parts_four: array<vec4<f32>, CHUNK_FOUR * WORKGROUP>;

fn expert_of(token: u32, slot: u32) -> u32 {
  if (ROUTED) { return chosen[token * params.slots + slot]; }
  return slot;
}

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

fn core_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = core[index >> 2u][index & 3u]; }
  return value;
}

// 4 elements of a row, 0 past its end.
fn z_block(token: u32, i: u32) -> vec4<f32> {
  let at = token * params.rank + i;
  if (ALIGNED) {
    var block = vec4(0.0);
    if (i < params.rank) { block = z[at >> 2u]; }
    return block;
  }
  let r = params.rank;
  return vec4(z_element(at, i < r), z_element(at + 1u, i + 1u < r), z_element(at + 2u, i + 2u < r), z_element(at + 3u, i + 3u < r));
}

fn du_block(token: u32, j: u32) -> vec4<f32> {
  let at = token * params.rank + j;
  if (ALIGNED) { return du[at >> 2u]; }
  let r = params.rank;
  return vec4(du_element(at, j < r), du_element(at + 1u, j + 1u < r), du_element(at + 2u, j + 2u < r), du_element(at + 3u, j + 3u < r));
}

// 4 elements of a row of an expert's matrix, 0 past its end; a row past the last is the last.
fn core_block(expert: u32, row: u32, j: u32) -> vec4<f32> {
  let r = params.rank;
  let at = (expert * r + min(row, r - 1u)) * r + j;
  if (ALIGNED) { return core[at >> 2u]; }
  return vec4(core_element(at, j < r), core_element(at + 1u, j + 1u < r), core_element(at + 2u, j + 2u < r),
    core_element(at + 3u, j + 3u < r));
}

fn store(token: u32, j: u32, v: vec4<f32>) {
  if (j < params.rank) {
    let at = token * params.rank + j;
    let rest = params.rank - j;
    out_rows[at] = v.x;
    if (rest > 1u) { out_rows[at + 1u] = v.y; }
    if (rest > 2u) { out_rows[at + 2u] = v.z; }
    if (rest > 3u) { out_rows[at + 3u] = v.w; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn apply(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (block >= params.tokens * params.blocks) { return; }
  let token = block / params.blocks;
  let j = (block % params.blocks) * 4u;
  var u = vec4(0.0);
  for (var slot = 0u; slot < params.slots; slot++) {
    let expert = expert_of(token, slot);
    if (expert >= params.experts) { continue; }
    var part = vec4(0.0);
    for (var i = 0u; i < params.rank; i += 4u) {
      // rows past the last meet zeros of z
      let x = z_block(token, i);
      part += x.x * core_block(expert, i, j) + x.y * core_block(expert, i + 1u, j)
        + x.z * core_block(expert, i + 2u, j) + x.w * core_block(expert, i + 3u, j);
    }
    u += gates[token * params.slots + slot] * part;
  }
  store(token, j, u);
}

@compute @workgroup_size(WORKGROUP)
fn merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (block >= params.tokens * params.blocks) { return; }
  let token = block / params.blocks;
  let j = (block % params.blocks) * 4u;
  var u = vec4(0.0);
  for (var i = 0u; i < params.rank; i += 4u) {
    var c0 = vec4(0.0);
    var c1 = vec4(0.0);
    var c2 = vec4(0.0);
    var c3 = vec4(0.0);
    for (var slot = 0u; slot < params.slots; slot++) {
      let expert = expert_of(token, slot);
      if (expert >= params.experts) { continue; }
      let gate = gates[token * params.slots + slot];
      c0 += gate * core_block(expert, i, j);
      c1 += gate * core_block(expert, i + 1u, j);
      c2 += gate * core_block(expert, i + 2u, j);
      c3 += gate * core_block(expert, i + 3u, j);
    }
    let x = z_block(token, i);
    u += x.x * c0 + x.y * c1 + x.z * c2 + x.w * c3;
  }
  store(token, j, u);
}

// The other tokens of a group of 4; past the last it is the last one again, which is computed and not stored.
fn next_tokens(first: u32) -> vec3<u32> {
  return min(vec3(first + 1u, first + 2u, first + 3u), vec3(params.tokens - 1u));
}

fn store_four(first: u32, j: u32, v0: vec4<f32>, v1: vec4<f32>, v2: vec4<f32>, v3: vec4<f32>) {
  store(first, j, v0);
  if (first + 1u < params.tokens) { store(first + 1u, j, v1); }
  if (first + 2u < params.tokens) { store(first + 2u, j, v2); }
  if (first + 3u < params.tokens) { store(first + 3u, j, v3); }
}

@compute @workgroup_size(WORKGROUP)
fn apply_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let t0 = block / params.blocks * 4u;
  if (t0 >= params.tokens) { return; }
  let next = next_tokens(t0);
  let j = (block % params.blocks) * 4u;
  var u0 = vec4(0.0);
  var u1 = vec4(0.0);
  var u2 = vec4(0.0);
  var u3 = vec4(0.0);
  for (var expert = 0u; expert < params.slots; expert++) {
    var p0 = vec4(0.0);
    var p1 = vec4(0.0);
    var p2 = vec4(0.0);
    var p3 = vec4(0.0);
    for (var i = 0u; i < params.rank; i += 4u) {
      let m0 = core_block(expert, i, j);
      let m1 = core_block(expert, i + 1u, j);
      let m2 = core_block(expert, i + 2u, j);
      let m3 = core_block(expert, i + 3u, j);
      let x0 = z_block(t0, i);
      let x1 = z_block(next.x, i);
      let x2 = z_block(next.y, i);
      let x3 = z_block(next.z, i);
      p0 += x0.x * m0 + x0.y * m1 + x0.z * m2 + x0.w * m3;
      p1 += x1.x * m0 + x1.y * m1 + x1.z * m2 + x1.w * m3;
      p2 += x2.x * m0 + x2.y * m1 + x2.z * m2 + x2.w * m3;
      p3 += x3.x * m0 + x3.y * m1 + x3.z * m2 + x3.w * m3;
    }
    u0 += gates[t0 * params.slots + expert] * p0;
    u1 += gates[next.x * params.slots + expert] * p1;
    u2 += gates[next.y * params.slots + expert] * p2;
    u3 += gates[next.z * params.slots + expert] * p3;
  }
  store_four(t0, j, u0, u1, u2, u3);
}

// Two rows of C at a time: 8 accumulators.
@compute @workgroup_size(WORKGROUP)
fn merge_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let t0 = block / params.blocks * 4u;
  if (t0 >= params.tokens) { return; }
  let next = next_tokens(t0);
  let j = (block % params.blocks) * 4u;
  var u0 = vec4(0.0);
  var u1 = vec4(0.0);
  var u2 = vec4(0.0);
  var u3 = vec4(0.0);
  for (var i = 0u; i < params.rank; i += 2u) {
    var c0 = vec4(0.0);
    var c1 = vec4(0.0);
    var c2 = vec4(0.0);
    var c3 = vec4(0.0);
    var d0 = vec4(0.0);
    var d1 = vec4(0.0);
    var d2 = vec4(0.0);
    var d3 = vec4(0.0);
    for (var expert = 0u; expert < params.slots; expert++) {
      let m = core_block(expert, i, j);
      let n = core_block(expert, i + 1u, j);
      let g0 = gates[t0 * params.slots + expert];
      let g1 = gates[next.x * params.slots + expert];
      let g2 = gates[next.y * params.slots + expert];
      let g3 = gates[next.z * params.slots + expert];
      c0 += g0 * m;
      c1 += g1 * m;
      c2 += g2 * m;
      c3 += g3 * m;
      d0 += g0 * n;
      d1 += g1 * n;
      d2 += g2 * n;
      d3 += g3 * n;
    }
    let inside = i + 1u < params.rank;
    let r = params.rank;
    u0 += z_element(t0 * r + i, true) * c0 + z_element(t0 * r + i + 1u, inside) * d0;
    u1 += z_element(next.x * r + i, true) * c1 + z_element(next.x * r + i + 1u, inside) * d1;
    u2 += z_element(next.y * r + i, true) * c2 + z_element(next.y * r + i + 1u, inside) * d2;
    u3 += z_element(next.z * r + i, true) * c3 + z_element(next.z * r + i + 1u, inside) * d3;
  }
  store_four(t0, j, u0, u1, u2, u3);
}

// 4 rows of M[expert] du.
fn rows_times_du(expert: u32, i: u32, token: u32) -> vec4<f32> {
  var w = vec4(0.0);
  for (var j = 0u; j < params.rank; j += 4u) {
    let d = du_block(token, j);
    w += vec4(dot(core_block(expert, i, j), d), dot(core_block(expert, i + 1u, j), d),
      dot(core_block(expert, i + 2u, j), d), dot(core_block(expert, i + 3u, j), d));
  }
  return w;
}

// A part of dg: the rows of the first round, or of a later one, in which the same invocation has the same element.
fn store_gate(token: u32, slot: u32, first_round: bool, part: f32) {
  if (token < params.tokens) {
    let at = token * params.slots + slot;
    if (first_round) { d_gates[at] = part; } else { d_gates[at] += part; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tokens_here = WORKGROUP / LANES;
  let first_token = (workgroup.y * params.groups_per_row + workgroup.x) * tokens_here;
  if (first_token >= params.tokens) { return; }
  // Invocations past the last token compute the last one again, so that all meet the barriers.
  let token = min(first_token + local / LANES, params.tokens - 1u);
  let is_token = first_token + local / LANES < params.tokens;
  for (var first_block = 0u; first_block < params.blocks; first_block += LANES) {
    let i = (first_block + local % LANES) * 4u;
    let x = z_block(token, i);
    var dz = vec4(0.0);
    for (var first_slot = 0u; first_slot < params.slots; first_slot += CHUNK) {
      let count = min(CHUNK, params.slots - first_slot);
      for (var c = 0u; c < count; c++) {
        let expert = expert_of(token, first_slot + c);
        var part = 0.0;
        if (expert < params.experts && i < params.rank) {
          let w = rows_times_du(expert, i, token);
          dz += gates[token * params.slots + first_slot + c] * w;
          part = dot(x, w);
        }
        parts[c * WORKGROUP + local] = part;
      }
      workgroupBarrier();
      for (var q = 0u; q < count * tokens_here; q += WORKGROUP) {
        let c = (q + local) / tokens_here;
        let here = (q + local) % tokens_here;
        if (c < count) {
          var sum = 0.0;
          for (var lane = 0u; lane < LANES; lane++) { sum += parts[c * WORKGROUP + here * LANES + lane]; }
          store_gate(first_token + here, first_slot + c, first_block == 0u, sum);
        }
      }
      workgroupBarrier();
    }
    if (is_token) { store(token, i, dz); }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let quads_here = WORKGROUP / LANES;
  let first_token = (workgroup.y * params.groups_per_row + workgroup.x) * quads_here * 4u;
  if (first_token >= params.tokens) { return; }
  // Invocations past the last token compute the last one again, so that all meet the barriers.
  let own = first_token + local / LANES * 4u;
  let t0 = min(own, params.tokens - 1u);
  let next = next_tokens(t0);
  for (var first_block = 0u; first_block < params.blocks; first_block += LANES) {
    let i = (first_block + local % LANES) * 4u;
    let x0 = z_block(t0, i);
    let x1 = z_block(next.x, i);
    let x2 = z_block(next.y, i);
    let x3 = z_block(next.z, i);
    var dz0 = vec4(0.0);
    var dz1 = vec4(0.0);
    var dz2 = vec4(0.0);
    var dz3 = vec4(0.0);
    for (var first_slot = 0u; first_slot < params.slots; first_slot += CHUNK_FOUR) {
      let count = min(CHUNK_FOUR, params.slots - first_slot);
      for (var c = 0u; c < count; c++) {
        let expert = first_slot + c;
        var w0 = vec4(0.0);
        var w1 = vec4(0.0);
        var w2 = vec4(0.0);
        var w3 = vec4(0.0);
        if (i < params.rank) {
          for (var j = 0u; j < params.rank; j += 4u) {
            let m0 = core_block(expert, i, j);
            let m1 = core_block(expert, i + 1u, j);
            let m2 = core_block(expert, i + 2u, j);
            let m3 = core_block(expert, i + 3u, j);
            let d0 = du_block(t0, j);
            let d1 = du_block(next.x, j);
            let d2 = du_block(next.y, j);
            let d3 = du_block(next.z, j);
            w0 += vec4(dot(m0, d0), dot(m1, d0), dot(m2, d0), dot(m3, d0));
            w1 += vec4(dot(m0, d1), dot(m1, d1), dot(m2, d1), dot(m3, d1));
            w2 += vec4(dot(m0, d2), dot(m1, d2), dot(m2, d2), dot(m3, d2));
            w3 += vec4(dot(m0, d3), dot(m1, d3), dot(m2, d3), dot(m3, d3));
          }
          dz0 += gates[t0 * params.slots + expert] * w0;
          dz1 += gates[next.x * params.slots + expert] * w1;
          dz2 += gates[next.y * params.slots + expert] * w2;
          dz3 += gates[next.z * params.slots + expert] * w3;
        }
        parts_four[c * WORKGROUP + local] = vec4(dot(x0, w0), dot(x1, w1), dot(x2, w2), dot(x3, w3));
      }
      workgroupBarrier();
      for (var q = 0u; q < count * quads_here; q += WORKGROUP) {
        let c = (q + local) / quads_here;
        let here = (q + local) % quads_here;
        if (c < count) {
          var sum = vec4(0.0);
          for (var lane = 0u; lane < LANES; lane++) { sum += parts_four[c * WORKGROUP + here * LANES + lane]; }
          let token = first_token + here * 4u;
          store_gate(token, first_slot + c, first_block == 0u, sum.x);
          store_gate(token + 1u, first_slot + c, first_block == 0u, sum.y);
          store_gate(token + 2u, first_slot + c, first_block == 0u, sum.z);
          store_gate(token + 3u, first_slot + c, first_block == 0u, sum.w);
        }
      }
      workgroupBarrier();
    }
    if (own < params.tokens) { store_four(t0, i, dz0, dz1, dz2, dz3); }
  }
}
