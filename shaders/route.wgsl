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
// Grid          forward: one invocation a token: k / 4 passes over its logits, each looking for the four largest keys after the
//               last in the order; no marks, no memory.  backward: one invocation a logit.  Folded into (x, y).
// Numbers       s = exp(min(l, 0)) / (1 + exp(-|l|)): only exponentials of numbers that are not positive are taken, and the largest
//               exponent is taken off before the sum, so that logits of any size neither overflow nor leave a sum of 0.

override WORKGROUP: u32 = 64u;

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

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (token < params.tokens) { route_token(token); }
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
