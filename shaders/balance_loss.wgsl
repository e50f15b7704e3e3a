// The load-balancing loss of a router:   loss = E sum_e f[e] P[e],   P[e] = mean_t p[t, e],   p[t] = softmax(logits[t])
//
//   load        f[e] = (how many of the choices are e) / (T k); no gradient flows through it
//   row         mixed[t] = sum_e f[e] p[t, e]
//   total       loss = scale sum_t mixed[t]                                       scale = E / T, k times that in Hugging Face's form
//   backward    dlogits[t, e] = dloss scale p[t, e] (f[e] - mixed[t])
//
// Layouts       logits, dlogits: [T, E] row-major;  chosen: [T, k];  f: [E];  mixed: [T];  loss, dloss: one number.
// Grid          load: one workgroup an expert, which looks at every choice: E T k reads, nearly all from cache, and no atomics on
//               memory that would have to be cleared first. row, backward: one workgroup a token, trees in workgroup memory.
//               total: one workgroup. Folded into (x, y): a dimension stops at 65,535 workgroups.
// Bounds        a choice is only compared with: one that is no expert counts for none.

override WORKGROUP: u32 = 64u;

struct Params {
  tokens: u32,
  experts: u32,
  choices: u32, // T k
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> chosen: array<i32>;            // load only
@group(0) @binding(3) var<storage, read_write> load_result: array<f32>; // load only
@group(0) @binding(4) var<storage, read> f: array<f32>;                 // row, backward
@group(0) @binding(5) var<storage, read_write> mixed: array<f32>;       // row: written, total: read
@group(0) @binding(6) var<storage, read> dloss: array<f32>;             // backward only
@group(0) @binding(7) var<storage, read_write> result: array<f32>;      // total: loss, backward: dlogits

var<workgroup> hits_tree: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn load(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let expert = workgroup.y * params.groups_per_row + workgroup.x;
  if (expert >= params.experts) { return; }
  // Integers: exact for any number of choices.
  var hits = 0u;
  for (var q = local; q < params.choices; q += WORKGROUP) {
    hits += select(0u, 1u, chosen[q] == i32(expert));
  }
  hits_tree[local] = hits;
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local < half) { hits_tree[local] += hits_tree[local + half]; }
  }
  if (local == 0u) { load_result[expert] = f32(hits_tree[0]) / f32(params.choices); }
}

// sum_e f[e] p[t, e], given the maximum and the sum of exponentials of the token's logits.
fn mix(start: u32, m_s: vec2<f32>, local: u32) -> f32 {
  var sum = 0.0;
  for (var e = local; e < params.experts; e += WORKGROUP) {
    sum += f[e] * exp(logits[start + e] - m_s.x);
  }
  return workgroup_sum(sum, local) / m_s.y;
}

@compute @workgroup_size(WORKGROUP)
fn row(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let t = workgroup.y * params.groups_per_row + workgroup.x;
  if (t >= params.tokens) { return; }
  let start = t * params.experts;
  let mixed_of_token = mix(start, row_soft_max(start, params.experts, local), local);
  if (local == 0u) { mixed[t] = mixed_of_token; }
}

@compute @workgroup_size(WORKGROUP)
fn total(@builtin(local_invocation_index) local: u32) {
  var sum = 0.0;
  for (var t = local; t < params.tokens; t += WORKGROUP) {
    sum += mixed[t];
  }
  let all = workgroup_sum(sum, local);
  if (local == 0u) { result[0] = params.scale * all; }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let t = workgroup.y * params.groups_per_row + workgroup.x;
  if (t >= params.tokens) { return; }
  let start = t * params.experts;
  let m_s = row_soft_max(start, params.experts, local);
  let mixed_of_token = mix(start, m_s, local);
  for (var e = local; e < params.experts; e += WORKGROUP) {
    let p = exp(logits[start + e] - m_s.x) / m_s.y;
    result[start + e] = dloss[0] * params.scale * p * (f[e] - mixed_of_token);
  }
}
