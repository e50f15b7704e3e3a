// The router's z loss:   loss = mean_t lse[t]^2,   lse[t] = logsumexp(logits[t])
//
//   row         lse[t]
//   total       loss = scale sum_t lse[t]^2                        scale = 1 / tokens
//   backward    dlogits[t, e] = dloss 2 scale lse[t] p[t, e],      p[t, e] = exp(logits[t, e] - lse[t])
//
// Layouts       logits, dlogits: [tokens, experts] row-major;  lse: [tokens];  loss, dloss: one number.
// Grid          row: one workgroup a token, a tree in workgroup memory. total: one workgroup, which reads 4 bytes a token.
//               backward: one invocation an element. Folded into (x, y): a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;

struct Params {
  tokens: u32,
  experts: u32,
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> lse_result: array<f32>;  // row only
@group(0) @binding(3) var<storage, read> lse: array<f32>;               // total, backward
@group(0) @binding(4) var<storage, read> dloss: array<f32>;             // backward only
@group(0) @binding(5) var<storage, read_write> result: array<f32>;      // total: loss, backward: dlogits

@compute @workgroup_size(WORKGROUP)
fn row(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let t = workgroup.y * params.groups_per_row + workgroup.x;
  if (t >= params.tokens) { return; }
  let m_s = row_soft_max(t * params.experts, params.experts, local);
  if (local == 0u) { lse_result[t] = m_s.x + log(m_s.y); }
}

@compute @workgroup_size(WORKGROUP)
fn total(@builtin(local_invocation_index) local: u32) {
  var sum = 0.0;
  for (var t = local; t < params.tokens; t += WORKGROUP) {
    sum += lse[t] * lse[t];
  }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { result[0] = params.scale * all; }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q >= params.tokens * params.experts) { return; }
  let lse_of_token = lse[q / params.experts];
  result[q] = dloss[0] * (2.0 * params.scale) * lse_of_token * exp(logits[q] - lse_of_token);
}
