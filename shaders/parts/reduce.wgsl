// Sums over a workgroup. The module declares `override WORKGROUP`, a power of two.
//
// The order of the additions depends on WORKGROUP alone, so two runs are equal bit for bit. To be called by every invocation of
// the workgroup; every invocation gets the sum.

var<workgroup> sum_tree: array<f32, WORKGROUP>;

fn workgroup_sum(value: f32, local: u32) -> f32 {
  workgroupBarrier(); // an earlier sum may not have been read by all yet
  sum_tree[local] = value;
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local < half) { sum_tree[local] += sum_tree[local + half]; }
  }
  workgroupBarrier();
  return sum_tree[0];
}
