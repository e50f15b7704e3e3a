// The k experts of a token and their gates, by the formulas in route.wgsl. The module declares `params.experts`, `params.top_k`,
// `params.scale`, and the buffers `logits`, `bias`, `chosen`, `gates` and `norms`.

override RENORMALIZE: bool = true;
override SIGMOID: bool = false;
override BIASED: bool = false;

// The order of floats as the order of integers: on bits, because WGSL may assume that there is no NaN. A NaN is the
// smallest; no key is 0.
fn key_of(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 1u; }
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
  if (!BIASED || key == 1u) { return key; }
  if (SIGMOID) { return key_of(exp(exponent(logit)) / divisor(logit) + bias[expert]); }
  return key_of(logit + bias[expert]);
}

// Four choices a pass: those with the largest keys after the last one of the pass before, falling.
fn choose(first_logit: u32, first_slot: u32) {
  var last_key = 0xffffffffu;
  var last_expert = 0u;
  for (var slot = 0u; slot < params.top_k; slot += 4u) {
    var keys = vec4(0u);
    var experts = vec4(0u);
    for (var expert = 0u; expert < params.experts; expert++) {
      let key = selection_key(logits[first_logit + expert], expert);
      let is_after_last = key < last_key || (key == last_key && expert > last_expert);
      // Keys fall: what is above one is above those behind it, which move back by one.
      let above = vec4(select(0u, key, is_after_last)) > keys;
      let moves = vec4(false, above.xyz);
      keys = select(keys, select(vec4(key), vec4(0u, keys.xyz), moves), above);
      experts = select(experts, select(vec4(expert), vec4(0u, experts.xyz), moves), above);
    }
    last_key = keys.w;
    last_expert = experts.w;
    chosen[first_slot + slot] = experts.x;
    if (slot + 1u < params.top_k) { chosen[first_slot + slot + 1u] = experts.y; }
    if (slot + 2u < params.top_k) { chosen[first_slot + slot + 2u] = experts.z; }
    if (slot + 3u < params.top_k) { chosen[first_slot + slot + 3u] = experts.w; }
  }
}

fn route_token(token: u32) {
  let first_logit = token * params.experts;
  let first_slot = token * params.top_k;
  choose(first_logit, first_slot);
  var largest = 0.0;
  var sum = 0.0;
  if (RENORMALIZE) {
    for (var slot = 0u; slot < params.top_k; slot++) {
      let e = exponent(logits[first_logit + chosen[first_slot + slot]]);
      largest = select(max(largest, e), e, slot == 0u);
    }
  } else if (SIGMOID) {
    sum = 1.0;
  } else {
    largest = logits[first_logit];
    for (var expert = 1u; expert < params.experts; expert++) { largest = max(largest, logits[first_logit + expert]); }
    for (var expert = 0u; expert < params.experts; expert++) { sum += exp(logits[first_logit + expert] - largest); }
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
