// CoMoL's dense core routing and soft merge, all in rank space. For a token with the latent z:
//
//   apply, merge   logits = R z;   g = softmax(logits);   u = sum over the experts e of g[e] M[e]^T z, in the orders of mix_cores.wgsl
//   backward       w = M[e] du for every expert;   dg[e] = <z, w> (+ a gradient from outside);   D = dg - dg at the largest gate
//                  dlogits[e] = g[e] (D[e] - sum_i g[i] D[i]) (+ a gradient from outside);   dz = sum_e (g[e] w + dlogits[e] R[e])
//
// Layouts       z, u, du, dz: [tokens, r];  R: [experts, r];  core: [experts, r, r];  logits, gates and their gradients: [tokens, experts].
//               z, R, core and du are read as vec4s (ALIGNED: r is a multiple of 4), or element by element.
// Grid          one workgroup for WORKGROUP / LANES tokens, in the _four ones as many groups of 4 tokens, which read a matrix once for all
//               four. The LANES invocations of a token have 4 of its r elements each. Folded into (x, y).
// Memory        here: the logits, then the gates, of the tokens of the workgroup, backward the gradients of these: PLACES elements. parts:
//               backward, what each invocation adds to dg, for CHUNK experts between two barriers. One invocation adds the parts of a
//               token up, in the order of the rows.

override WORKGROUP: u32 = 64u;
override LANES: u32 = 4u;
override PLACES: u32 = 512u;
override ALIGNED: bool = true;
override OUTER_GATES: bool = false;  // whether the gates have a gradient from outside
override OUTER_LOGITS: bool = false; // whether the logits have one

const CHUNK = 8u;

struct Params {
  tokens: u32,
  slots: u32,   // as many as there are experts
  experts: u32,
  rank: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> core: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> router: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> gates: array<f32>;             // backward only
@group(0) @binding(5) var<storage, read> du: array<vec4<f32>>;          // backward only
@group(0) @binding(6) var<storage, read> outer_gates: array<f32>;       // backward only: the gates' gradient from outside
@group(0) @binding(7) var<storage, read_write> logits: array<f32>;      // backward: dlogits, at first that from outside (OUTER_LOGITS)
@group(0) @binding(8) var<storage, read_write> new_gates: array<f32>;   // apply, merge only
@group(0) @binding(9) var<storage, read_write> out_rows: array<f32>;    // apply, merge: u, backward: dz

var<workgroup> here: array<f32, PLACES>;
var<workgroup> here_four: array<vec4<f32>, PLACES>;
var<workgroup> parts: array<f32, CHUNK * WORKGROUP>;
var<workgroup> parts_four: array<vec4<f32>, CHUNK * WORKGROUP>;

fn expert_of(_token: u32, slot: u32) -> u32 {
  return slot;
}

fn gate_of(place: u32, slot: u32) -> f32 {
  return here[place + slot];
}

fn four_gates(place: u32, _t0: u32, _next: vec3<u32>, slot: u32) -> vec4<f32> {
  return here_four[place + slot];
}

fn router_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = router[index >> 2u][index & 3u]; }
  return value;
}

// 4 elements of an expert's row, 0 past its end.
fn router_block(expert: u32, i: u32) -> vec4<f32> {
  let r = params.rank;
  let at = expert * r + i;
  var block = vec4(0.0);
  if (ALIGNED) {
    if (i < r) { block = router[at >> 2u]; }
  } else {
    block = vec4(router_element(at, i < r), router_element(at + 1u, i + 1u < r), router_element(at + 2u, i + 2u < r),
      router_element(at + 3u, i + 3u < r));
  }
  return block;
}

fn first_place(workgroup: vec3<u32>) -> u32 {
  return (workgroup.y * params.groups_per_row + workgroup.x) * (WORKGROUP / LANES);
}

// The logits and gates of the workgroup's tokens, of which `first` is the first; those past the last token are computed of the last
// one and not stored. To be called by every invocation of the workgroup.
fn route(first: u32, local: u32) {
  let count = WORKGROUP / LANES * params.experts;
  for (var q = local; q < count; q += WORKGROUP) {
    let token = first + q / params.experts;
    let expert = q % params.experts;
    var logit = 0.0;
    for (var i = 0u; i < params.rank; i += 4u) {
      logit += dot(z_block(min(token, params.tokens - 1u), i), router_block(expert, i));
    }
    here[q] = logit;
    if (token < params.tokens) { logits[token * params.experts + expert] = logit; }
  }
  workgroupBarrier();
  let token = first + local / LANES;
  let place = local / LANES * params.experts;
  var largest = here[place];
  for (var e = 1u; e < params.experts; e++) { largest = max(largest, here[place + e]); }
  var sum = 0.0;
  for (var e = 0u; e < params.experts; e++) { sum += exp(here[place + e] - largest); }
  workgroupBarrier();
  for (var e = local % LANES; e < params.experts; e += LANES) {
    let gate = exp(here[place + e] - largest) / sum;
    here[place + e] = gate;
    if (token < params.tokens) { new_gates[token * params.experts + e] = gate; }
  }
  workgroupBarrier();
}

// The same for groups of four tokens.
fn route_four(first: u32, local: u32) {
  let count = WORKGROUP / LANES * params.experts;
  let last = params.tokens - 1u;
  for (var q = local; q < count; q += WORKGROUP) {
    let token = (first + q / params.experts) * 4u;
    let expert = q % params.experts;
    var logit = vec4(0.0);
    for (var i = 0u; i < params.rank; i += 4u) {
      let row = router_block(expert, i);
      logit += vec4(dot(z_block(min(token, last), i), row), dot(z_block(min(token + 1u, last), i), row),
        dot(z_block(min(token + 2u, last), i), row), dot(z_block(min(token + 3u, last), i), row));
    }
    here_four[q] = logit;
    let at = token * params.experts + expert;
    if (token <= last) { logits[at] = logit.x; }
    if (token + 1u <= last) { logits[at + params.experts] = logit.y; }
    if (token + 2u <= last) { logits[at + 2u * params.experts] = logit.z; }
    if (token + 3u <= last) { logits[at + 3u * params.experts] = logit.w; }
  }
  workgroupBarrier();
  let token = (first + local / LANES) * 4u;
  let place = local / LANES * params.experts;
  var largest = here_four[place];
  for (var e = 1u; e < params.experts; e++) { largest = max(largest, here_four[place + e]); }
  var sum = vec4(0.0);
  for (var e = 0u; e < params.experts; e++) { sum += exp(here_four[place + e] - largest); }
  workgroupBarrier();
  for (var e = local % LANES; e < params.experts; e += LANES) {
    let gate = exp(here_four[place + e] - largest) / sum;
    here_four[place + e] = gate;
    let at = token * params.experts + e;
    if (token <= last) { new_gates[at] = gate.x; }
    if (token + 1u <= last) { new_gates[at + params.experts] = gate.y; }
    if (token + 2u <= last) { new_gates[at + 2u * params.experts] = gate.z; }
    if (token + 3u <= last) { new_gates[at + 3u * params.experts] = gate.w; }
  }
  workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP)
fn apply(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = first_place(workgroup);
  if (first >= params.tokens) { return; }
  route(first, local);
  let token = first + local / LANES;
  let j = local % LANES * 4u;
  if (token < params.tokens && j < params.rank) { store(token, j, applied(token, local / LANES * params.experts, j)); }
}

@compute @workgroup_size(WORKGROUP)
fn merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = first_place(workgroup);
  if (first >= params.tokens) { return; }
  route(first, local);
  let token = first + local / LANES;
  let j = local % LANES * 4u;
  if (token < params.tokens && j < params.rank) { store(token, j, merged(token, local / LANES * params.experts, j)); }
}

@compute @workgroup_size(WORKGROUP)
fn apply_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = first_place(workgroup);
  if (first * 4u >= params.tokens) { return; }
  route_four(first, local);
  let t0 = (first + local / LANES) * 4u;
  let j = local % LANES * 4u;
  if (t0 < params.tokens && j < params.rank) {
    store_four(t0, j, applied_four(t0, next_tokens(t0), local / LANES * params.experts, j));
  }
}

@compute @workgroup_size(WORKGROUP)
fn merge_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = first_place(workgroup);
  if (first * 4u >= params.tokens) { return; }
  route_four(first, local);
  let t0 = (first + local / LANES) * 4u;
  let j = local % LANES * 4u;
  if (t0 < params.tokens && j < params.rank) {
    store_four(t0, j, merged_four(t0, next_tokens(t0), local / LANES * params.experts, j));
  }
}

fn outer_gate(token: u32, expert: u32) -> f32 {
  var value = 0.0;
  if (OUTER_GATES && token < params.tokens) { value = outer_gates[token * params.experts + expert]; }
  return value;
}

// Gives the gradient of a logit from outside and stores the whole.
fn add_outer_logit(token: u32, expert: u32, d: f32) -> f32 {
  var whole = d;
  if (token < params.tokens) {
    let at = token * params.experts + expert;
    if (OUTER_LOGITS) { whole += logits[at]; }
    logits[at] = whole;
  }
  return whole;
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tokens_here = WORKGROUP / LANES;
  let first = first_place(workgroup);
  if (first >= params.tokens) { return; }
  let experts = params.experts;
  let own = first + local / LANES;
  let token = min(own, params.tokens - 1u);
  let place = local / LANES * experts;
  let i = local % LANES * 4u;
  let x = z_block(token, i);
  var dz = vec4(0.0);
  for (var first_expert = 0u; first_expert < experts; first_expert += CHUNK) {
    let count = min(CHUNK, experts - first_expert);
    for (var c = 0u; c < count; c++) {
      var part = 0.0;
      if (i < params.rank) {
        let w = rows_times_du(first_expert + c, i, token);
        dz += gates[token * experts + first_expert + c] * w;
        part = dot(x, w);
      }
      parts[c * WORKGROUP + local] = part;
    }
    workgroupBarrier();
    for (var q = local; q < count * tokens_here; q += WORKGROUP) {
      let c = q / tokens_here;
      let t = q % tokens_here;
      var sum = 0.0;
      for (var lane = 0u; lane < LANES; lane++) { sum += parts[c * WORKGROUP + t * LANES + lane]; }
      here[t * experts + first_expert + c] = sum + outer_gate(first + t, first_expert + c);
    }
    workgroupBarrier();
  }
  var largest = -1.0;
  var of_largest = 0.0;
  for (var e = 0u; e < experts; e++) {
    let gate = gates[token * experts + e];
    of_largest = select(of_largest, here[place + e], gate > largest);
    largest = max(largest, gate);
  }
  var mean = 0.0;
  for (var e = 0u; e < experts; e++) { mean += gates[token * experts + e] * (here[place + e] - of_largest); }
  workgroupBarrier();
  for (var e = local % LANES; e < experts; e += LANES) {
    let d = gates[token * experts + e] * (here[place + e] - of_largest - mean);
    here[place + e] = add_outer_logit(own, e, d);
  }
  workgroupBarrier();
  for (var e = 0u; e < experts; e++) { dz += here[place + e] * router_block(e, i); }
  if (own < params.tokens) { store(own, i, dz); }
}

// The gates of a group of four tokens, from memory.
fn stored_gates(t0: u32, next: vec3<u32>, e: u32) -> vec4<f32> {
  let n = params.experts;
  return vec4(gates[t0 * n + e], gates[next.x * n + e], gates[next.y * n + e], gates[next.z * n + e]);
}

@compute @workgroup_size(WORKGROUP)
fn backward_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let quads_here = WORKGROUP / LANES;
  let first = first_place(workgroup);
  if (first * 4u >= params.tokens) { return; }
  let experts = params.experts;
  let own = (first + local / LANES) * 4u;
  let t0 = min(own, params.tokens - 1u);
  let next = next_tokens(t0);
  let place = local / LANES * experts;
  let i = local % LANES * 4u;
  let x0 = z_block(t0, i);
  let x1 = z_block(next.x, i);
  let x2 = z_block(next.y, i);
  let x3 = z_block(next.z, i);
  var dz0 = vec4(0.0);
  var dz1 = vec4(0.0);
  var dz2 = vec4(0.0);
  var dz3 = vec4(0.0);
  for (var first_expert = 0u; first_expert < experts; first_expert += CHUNK) {
    let count = min(CHUNK, experts - first_expert);
    for (var c = 0u; c < count; c++) {
      var part = vec4(0.0);
      if (i < params.rank) {
        let w = rows_times_four_du(first_expert + c, i, t0, next);
        let gate = stored_gates(t0, next, first_expert + c);
        dz0 += gate.x * w[0];
        dz1 += gate.y * w[1];
        dz2 += gate.z * w[2];
        dz3 += gate.w * w[3];
        part = vec4(dot(x0, w[0]), dot(x1, w[1]), dot(x2, w[2]), dot(x3, w[3]));
      }
      parts_four[c * WORKGROUP + local] = part;
    }
    workgroupBarrier();
    for (var q = local; q < count * quads_here; q += WORKGROUP) {
      let expert = first_expert + q / quads_here;
      let quad = q % quads_here;
      var sum = vec4(0.0);
      for (var lane = 0u; lane < LANES; lane++) { sum += parts_four[q / quads_here * WORKGROUP + quad * LANES + lane]; }
      let token = (first + quad) * 4u;
      here_four[quad * experts + expert] = sum
        + vec4(outer_gate(token, expert), outer_gate(token + 1u, expert), outer_gate(token + 2u, expert), outer_gate(token + 3u, expert));
    }
    workgroupBarrier();
  }
  var largest = vec4(-1.0);
  var of_largest = vec4(0.0);
  for (var e = 0u; e < experts; e++) {
    let gate = stored_gates(t0, next, e);
    of_largest = select(of_largest, here_four[place + e], gate > largest);
    largest = max(largest, gate);
  }
  var mean = vec4(0.0);
  for (var e = 0u; e < experts; e++) { mean += stored_gates(t0, next, e) * (here_four[place + e] - of_largest); }
  workgroupBarrier();
  for (var e = local % LANES; e < experts; e += LANES) {
    let d = stored_gates(t0, next, e) * (here_four[place + e] - of_largest - mean);
    here_four[place + e] = vec4(add_outer_logit(own, e, d.x), add_outer_logit(own + 1u, e, d.y), add_outer_logit(own + 2u, e, d.z),
      add_outer_logit(own + 3u, e, d.w));
  }
  workgroupBarrier();
  for (var e = 0u; e < experts; e++) {
    let d = here_four[place + e];
    let row = router_block(e, i);
    dz0 += d.x * row;
    dz1 += d.y * row;
    dz2 += d.z * row;
    dz3 += d.w * row;
  }
  if (own < params.tokens) { store_four(own, i, mat4x4(dz0, dz1, dz2, dz3)); }
}
