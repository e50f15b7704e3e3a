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

// A place is where the token's gates start.
fn gate_of(place: u32, slot: u32) -> f32 {
  return gates[place + slot];
}

fn four_gates(_place: u32, t0: u32, next: vec3<u32>, slot: u32) -> vec4<f32> {
  let s = params.slots;
  return vec4(gates[t0 * s + slot], gates[next.x * s + slot], gates[next.y * s + slot], gates[next.z * s + slot]);
}

@compute @workgroup_size(WORKGROUP)
fn apply(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (block >= params.tokens * params.blocks) { return; }
  let token = block / params.blocks;
  let j = (block % params.blocks) * 4u;
  store(token, j, applied(token, token * params.slots, j));
}

@compute @workgroup_size(WORKGROUP)
fn merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (block >= params.tokens * params.blocks) { return; }
  let token = block / params.blocks;
  let j = (block % params.blocks) * 4u;
  store(token, j, merged(token, token * params.slots, j));
}

@compute @workgroup_size(WORKGROUP)
fn apply_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let t0 = block / params.blocks * 4u;
  if (t0 >= params.tokens) { return; }
  let j = (block % params.blocks) * 4u;
  store_four(t0, j, applied_four(t0, next_tokens(t0), 0u, j));
}

@compute @workgroup_size(WORKGROUP)
fn merge_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let t0 = block / params.blocks * 4u;
  if (t0 >= params.tokens) { return; }
  let j = (block % params.blocks) * 4u;
  store_four(t0, j, merged_four(t0, next_tokens(t0), 0u, j));
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
        var part = vec4(0.0);
        if (i < params.rank) {
          let w = rows_times_four_du(expert, i, t0, next);
          let gate = four_gates(0u, t0, next, expert);
          dz0 += gate.x * w[0];
          dz1 += gate.y * w[1];
          dz2 += gate.z * w[2];
          dz3 += gate.w * w[3];
          part = vec4(dot(x0, w[0]), dot(x1, w[1]), dot(x2, w[2]), dot(x3, w[3]));
        }
        parts_four[c * WORKGROUP + local] = part;
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
    if (own < params.tokens) { store_four(t0, i, mat4x4(dz0, dz1, dz2, dz3)); }
  }
}
