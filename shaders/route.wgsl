// Top-k softmax routing.
//
//   forward     experts = the k largest logits of a token, falling; equal ones: the lower expert first; NaN last
//               RENORMALIZE: gates_j = exp(l_j) / sum over the chosen i of exp(l_i);   else: over all experts i
//   backward    RENORMALIZE: dl_e = g_e sum over the chosen i of g_i (G_e - G_i), 0 for experts not chosen
//               else: dl_e = g_e G_e [chosen] - p_e m, with m = sum over the chosen i of g_i G_i
//               with G the gradient of the gates, p the softmax over all. The sum of differences equals g_e (G_e - m), but keeps
//               its digits when one gate is nearly 1.
//
// Layouts       logits, d_logits: [tokens, experts];  chosen: [tokens, k] i32;  gates, d_gates: [tokens, k].
// Grid          forward: one invocation a token: k passes over its logits, each looking for the largest one after the last
//               in the order; no marks, no memory.  backward: one invocation a logit.  Folded into (x, y).

override WORKGROUP: u32 = 64u;
override RENORMALIZE: bool = true;

struct Params {
  tokens: u32,
  experts: u32,
  top_k: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>;
@group(0) @binding(3) var<storage, read_write> gates: array<f32>;
@group(0) @binding(4) var<storage, read> given_chosen: array<u32>;
@group(0) @binding(5) var<storage, read> given_gates: array<f32>;
@group(0) @binding(6) var<storage, read> d_gates: array<f32>;
@group(0) @binding(7) var<storage, read_write> d_logits: array<f32>;

// The order of floats as the order of integers: on bits, because WGSL may assume that there is no NaN.
fn key_of(logit: f32) -> u32 {
  let bits = bitcast<u32>(logit);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0u; }
  if (magnitude == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (token >= params.tokens) { return; }
  let first_logit = token * params.experts;
  let first_slot = token * params.top_k;
  var last_key = 0xffffffffu;
  var last_expert = -1;
  var largest = 0.0;
  var sum = 0.0;
  for (var slot = 0u; slot < params.top_k; slot++) {
    var best_key = 0u;
    var best_expert = -1;
    for (var expert = 0; expert < i32(params.experts); expert++) {
      let key = key_of(logits[first_logit + u32(expert)]);
      let after_last = key < last_key || (key == last_key && expert > last_expert);
      if (after_last && (best_expert < 0 || key > best_key)) {
        best_key = key;
        best_expert = expert;
      }
    }
    last_key = best_key;
    last_expert = max(best_expert, 0);
    let logit = logits[first_logit + u32(last_expert)];
    if (slot == 0u) { largest = logit; }
    let weight = exp(logit - largest);
    chosen[first_slot + slot] = u32(last_expert);
    gates[first_slot + slot] = weight;
    sum += weight;
  }
  if (!RENORMALIZE) {
    sum = 0.0;
    for (var expert = 0u; expert < params.experts; expert++) { sum += exp(logits[first_logit + expert] - largest); }
  }
  for (var slot = 0u; slot < params.top_k; slot++) { gates[first_slot + slot] /= sum; }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.tokens * params.experts) { return; }
  let token = element / params.experts;
  let expert = element % params.experts;
  let first_slot = token * params.top_k;
  var mean = 0.0;
  var gate = 0.0;
  var d_gate = 0.0;
  for (var slot = first_slot; slot < first_slot + params.top_k; slot++) {
    let g = given_gates[slot];
    let d = d_gates[slot];
    mean += g * d;
    if (given_chosen[slot] == expert) {
      gate = g;
      d_gate = d;
    }
  }
  if (RENORMALIZE) {
    var sum = 0.0;
    for (var slot = first_slot; slot < first_slot + params.top_k; slot++) {
      sum += given_gates[slot] * (d_gate - d_gates[slot]);
    }
    d_logits[element] = gate * sum;
  } else {
    // the first gate belongs to the largest logit: all probabilities follow from it
    let largest = logits[token * params.experts + min(given_chosen[first_slot], params.experts - 1u)];
    let probability = given_gates[first_slot] * exp(logits[element] - largest);
    d_logits[element] = gate * d_gate - probability * mean;
  }
}
