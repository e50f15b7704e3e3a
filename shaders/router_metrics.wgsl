// What a router does, in a few numbers:
//
//   count       counts[e] = pairs that chose e;   dropped[e] = those of them beyond the capacity
//   row         entropies[t] = -sum_e p[t, e] ln p[t, e] = ln s - (sum_e exp(d_e) d_e) / s,   d_e = logit[t, e] - max, s = sum_e exp(d_e)
//   total       entropy = mean of the entropies
//
// Layouts       logits: [tokens, experts];  offsets: where each expert's pairs start, before dropping;  counts, dropped: [experts];
//               entropies: [tokens];  entropy: one number.
// Grid          count: one invocation an expert: the counts are differences of offsets, no pair is looked at.  row: one workgroup a
//               token.  total: one workgroup.  Folded into (x, y).

override WORKGROUP: u32 = 64u;

struct Params {
  tokens: u32,
  experts: u32,
  capacity: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> dropped: array<u32>;
@group(0) @binding(5) var<storage, read_write> entropies: array<f32>;
@group(0) @binding(6) var<storage, read_write> entropy: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn count(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let expert = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (expert >= params.experts) { return; }
  let chosen = offsets[expert + 1u] - offsets[expert];
  counts[expert] = chosen;
  dropped[expert] = chosen - min(chosen, params.capacity);
}

@compute @workgroup_size(WORKGROUP)
fn row(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = workgroup.y * params.groups_per_row + workgroup.x;
  if (token >= params.tokens) { return; }
  let start = token * params.experts;
  let m_s = row_soft_max(start, params.experts, local);
  var sum = 0.0;
  for (var e = local; e < params.experts; e += WORKGROUP) {
    let d = logits[start + e] - m_s.x;
    // An expert that is masked out has no part in the entropy: not 0 times infinity.
    sum += exp(d) * max(d, -200.0);
  }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { entropies[token] = log(m_s.y) - all / m_s.y; }
}

@compute @workgroup_size(WORKGROUP)
fn total(@builtin(local_invocation_index) local: u32) {
  var sum = 0.0;
  for (var t = local; t < params.tokens; t += WORKGROUP) { sum += entropies[t]; }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { entropy[0] = all / f32(params.tokens); }
}
