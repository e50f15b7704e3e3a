// The gradient of a gated expand in rank space, with v = W^T dy:
//
//   dz[p, :] = scale g[p] v[p, :]        dg[p] = scale <v[p, :], z[p, :]>
//
// Layouts       v, z, dz: [pairs, rank];  gates, d_gates: [pairs].
// Grid          one invocation a pair, folded into (x, y). The [tokens, out] output of a single expert is never needed.

override WORKGROUP: u32 = 64u;

struct Params {
  pairs: u32,
  rank: u32,
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read> z: array<f32>;
@group(0) @binding(3) var<storage, read> gates: array<f32>;
@group(0) @binding(4) var<storage, read_write> dz: array<f32>;
@group(0) @binding(5) var<storage, read_write> d_gates: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let pair = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (pair >= params.pairs) { return; }
  let factor = params.scale * gates[pair];
  var product = 0.0;
  for (var at = pair * params.rank; at < (pair + 1u) * params.rank; at++) {
    product += v[at] * z[at];
    dz[at] = factor * v[at];
  }
  d_gates[pair] = params.scale * product;
}
