// Top-k routing.
//
//   forward     experts = the k experts with the largest key, falling; equal ones: the lower expert first; NaN last
//               key      BIASED: l + b, or s + b with SIGMOID;   else: l, which orders as s does but never saturates
//               w_j      exp(l_j), or s_j = sigmoid(l_j) with SIGMOID; b has no part in it
//               gates_j  RENORMALIZE: scale w_j / sum over the chosen i of w_i
//                        else: scale exp(l_j) / sum over all experts i of exp(l_i), or scale s_j with SIGMOID
//   backward    G the gradient of the gates, g the gates / scale, c_e = 1, or 1 - s_e with SIGMOID
//               RENORMALIZE: dl_e = scale c_e g_e sum over the chosen i of g_i (G_e - G_i), 0 for experts not chosen
//               SIGMOID: dl_e = scale c_e g_e G_e [chosen]
//               else: dl_e = scale g_e (sum over the chosen i of g_i (G_e - G_i) + rest G_e), -scale p_e m for experts not chosen,
//               with m = sum over the chosen i of g_i G_i, p the softmax over all, rest the sum of p over the experts not chosen. The sums
//               of differences equal g_e (G_e - m), but keep their digits when one gate is nearly 1.
//
// Layouts       logits, d_logits: [tokens, experts];  bias: [experts] (BIASED);  chosen: [tokens, k] i32;
//               gates, d_gates: [tokens, k];  norms: [tokens] of four (the exponent taken off, the sum of the weights
//               counted, rest, 0).
// Grid          forward: one invocation a token: k passes over its logits, each looking for the largest key after the last
//               in the order; no marks, no memory.  backward: one invocation a logit.  Folded into (x, y).
// Numbers       s = exp(min(l, 0)) / (1 + exp(-|l|)): only exponentials of numbers that are not positive are taken, and the largest
//               exponent is taken off before the sum, so that logits of any size neither overflow nor leave a sum of 0.

override WORKGROUP: u32 = 64u;
override RENORMALIZE: bool = true;
override SIGMOID: bool = false;
override BIASED: bool = false;

struct Params {
  tokens: u32,
  experts: u32,
  top_k: u32,
  scale: f32,
  inverse_scale: f32,
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
@group(0) @binding(8) var<storage, read> bias: array<f32>;
@group(0) @binding(9) var<storage, read_write> norms: array<vec4<f32>>;
@group(0) @binding(10) var<storage, read> given_norms: array<vec4<f32>>;

// The order of floats as the order of integers: on bits, because WGSL may assume that there is no NaN.
fn key_of(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0u; }
  if (magnitude == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

// The weight of a logit is exp(exponent(l)) / divisor(l).
fn exponent(logit: f32) -> f32 {
  if (SIGMOID) { return min(logit, 0.0); }
  return logit;
}

fn divisor(logit: f32) -> f32 {
  if (SIGMOID) { return 1.0 + exp(-abs(logit)); }
  return 1.0;
}

fn selection_key(logit: f32, expert: u32) -> u32 {
  let key = key_of(logit);
  if (!BIASED || key == 0u) { return key; }
  if (SIGMOID) { return key_of(exp(exponent(logit)) / divisor(logit) + bias[expert]); }
  return key_of(logit + bias[expert]);
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
  for (var slot = 0u; slot < params.top_k; slot++) {
    var best_key = 0u;
    var best_expert = -1;
    for (var expert = 0; expert < i32(params.experts); expert++) {
      let key = selection_key(logits[first_logit + u32(expert)], u32(expert));
      let after_last = key < last_key || (key == last_key && expert > last_expert);
      if (after_last && (best_expert < 0 || key > best_key)) {
        best_key = key;
        best_expert = expert;
      }
    }
    last_key = best_key;
    last_expert = max(best_expert, 0);
    let e = exponent(logits[first_logit + u32(last_expert)]);
    largest = select(max(largest, e), e, slot == 0u);
    chosen[first_slot + slot] = u32(last_expert);
  }
  var sum = 0.0;
  if (!RENORMALIZE) {
    largest = 0.0;
    sum = 1.0;
    if (!SIGMOID) {
      largest = logits[first_logit];
      for (var expert = 1u; expert < params.experts; expert++) { largest = max(largest, logits[first_logit + expert]); }
      sum = 0.0;
      for (var expert = 0u; expert < params.experts; expert++) { sum += exp(logits[first_logit + expert] - largest); }
    }
  }
  for (var slot = 0u; slot < params.top_k; slot++) {
    let logit = logits[first_logit + chosen[first_slot + slot]];
    let weight = exp(exponent(logit) - largest) / divisor(logit);
    gates[first_slot + slot] = weight;
    if (RENORMALIZE) { sum += weight; }
  }
  for (var slot = 0u; slot < params.top_k; slot++) {
    gates[first_slot + slot] = params.scale * (gates[first_slot + slot] / sum);
  }
  var rest = 0.0;
  if (!RENORMALIZE && !SIGMOID) {
    for (var expert = 0u; expert < params.experts; expert++) {
      var is_chosen = false;
      for (var slot = 0u; slot < params.top_k; slot++) { is_chosen = is_chosen || chosen[first_slot + slot] == expert; }
      if (!is_chosen) { rest += exp(logits[first_logit + expert] - largest) / sum; }
    }
  }
  norms[token] = vec4(largest, sum, rest, 0.0);
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
  var is_chosen = false;
  for (var slot = first_slot; slot < first_slot + params.top_k; slot++) {
    let g = given_gates[slot];
    let d = d_gates[slot];
    mean += g * d;
    if (given_chosen[slot] == expert) {
      gate = g;
      d_gate = d;
      is_chosen = true;
    }
  }
  let logit = logits[element];
  var complement = 1.0;
  if (SIGMOID) { complement = exp(min(-logit, 0.0)) / divisor(logit); }
  if (!RENORMALIZE && SIGMOID) {
    d_logits[element] = complement * gate * d_gate;
    return;
  }
  let norm = given_norms[token];
  if (!RENORMALIZE && !is_chosen) {
    d_logits[element] = -exp(logit - norm.x) / norm.y * mean;
    return;
  }
  // rest is 0 with RENORMALIZE
  var sum = norm.z * d_gate;
  for (var slot = first_slot; slot < first_slot + params.top_k; slot++) {
    sum += params.inverse_scale * given_gates[slot] * (d_gate - d_gates[slot]);
  }
  d_logits[element] = complement * gate * sum;
}
