// The gradient of a gated expand of latents that were rotated in planes, in rank space: gate_gradient.wgsl and the backward pass of
// rotate_planes.wgsl in one. With v = W^T dy for every pair and u the rotated latents:
//
//   du = scale g v        dg = scale <v, u>
//   dz = R^T du           dp[i] = du[2i+1] u[2i] - du[2i] u[2i+1]
//
// An angle of 0 copies, as in rotate_planes.wgsl.
//
// Layouts       v, u, dz: [pairs, rank], read as vec2 planes;  p, dp: [pairs, rank / 2];  gates, d_gates: [pairs].
// Grid          one invocation a pair, folded into (x, y).

override WORKGROUP: u32 = 64u;

struct Params {
  pairs: u32,
  planes: u32, // rank / 2
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> v: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> u: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> gates: array<f32>;
@group(0) @binding(4) var<storage, read> angles: array<f32>;
@group(0) @binding(5) var<storage, read_write> dz: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> d_angles: array<f32>;
@group(0) @binding(7) var<storage, read_write> d_gates: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let pair = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (pair >= params.pairs) { return; }
  let factor = params.scale * gates[pair];
  var product = 0.0;
  for (var i = 0u; i < params.planes; i++) {
    let q = pair * params.planes + i;
    let own = v[q];
    let y = u[q];
    let d = factor * own;
    let angle = angles[q];
    let r = cos_sin(angle);
    product += dot(own, y);
    dz[q] = select(vec2(r.x * d.x + r.y * d.y, r.x * d.y - r.y * d.x), d, angle == 0.0);
    d_angles[q] = d.y * y.x - d.x * y.y;
  }
  d_gates[pair] = params.scale * product;
}
