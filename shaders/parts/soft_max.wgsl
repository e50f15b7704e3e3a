// Maximum and sum of exponentials of a row of `logits`, by one workgroup. The module declares `override WORKGROUP`, a power of
// two, and `logits: array<f32>`.
//
//   row_soft_max    (m, s):  m = max_c logit[c],  s = sum_c exp(logit[c] - m);   logsumexp = m + log s,  p[c] = exp(logit[c] - m) / s
//
// One read of the row: a new maximum scales down the sum so far, which matters when a row of 49,152 logits does not fit into a
// cache. m starts at the lowest float, not at an infinity: WGSL may assume that there are none. The exponent is kept above -87, where
// exp is still a normal number: what it is multiplied by is then 0 (nothing summed yet) or 1e-38 of the total.

const LOWEST = -3.4028234e38; // f32's own: a logit that masks with it is no lower

var<workgroup> soft_max_tree: array<vec2<f32>, WORKGROUP>;

// Of two pairs, the one with the larger maximum keeps its sum as it is: a row of one logit gives s = 1 exactly.
fn merge_soft_max(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let shrink = exp(max(-abs(a.x - b.x), -87.0));
  return select(vec2(a.x, a.y + b.y * shrink), vec2(b.x, a.y * shrink + b.y), b.x > a.x);
}

// To be called by every invocation of the workgroup, once; every invocation gets the result.
fn row_soft_max(start: u32, count: u32, local: u32) -> vec2<f32> {
  var found = vec2(LOWEST, 0.0);
  for (var c = local; c < count; c += WORKGROUP) {
    found = merge_soft_max(found, vec2(logits[start + c], 1.0));
  }
  soft_max_tree[local] = found;
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local < half) { soft_max_tree[local] = merge_soft_max(soft_max_tree[local], soft_max_tree[local + half]); }
  }
  workgroupBarrier();
  return soft_max_tree[0];
}
