// Plane rotations in the rank space: one angle p[i] for each pair of coordinates (2i, 2i+1).
//
//   forward     y[2i]   = cos p[i] * z[2i] - sin p[i] * z[2i+1]
//               y[2i+1] = sin p[i] * z[2i] + cos p[i] * z[2i+1]
//   backward    dz = R^T dy      dp[i] = dy[2i+1] * y[2i] - dy[2i] * y[2i+1]       (from the output: z is not kept)
//
// An angle of 0 copies the pair: 1 z - 0 z' would lose the sign of a zero, and make NaN of an infinity.
//
// Layouts       z, y, dy, dz: [rows, rank] row-major, read as vec4s of two pairs;  p, dp: [rows, rank / 2].  Pair row * rank / 2 + i; every
//               buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS times two pairs, folded into (x, y) because a dimension stops at 65,535 workgroups.
// Cost          20 bytes a pair forward, 32 backward, about 40 FLOP: memory-bound everywhere, so nothing is staged.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart

struct Params {
  pairs: u32,
  groups_per_row: u32, // workgroups along x of the folded grid
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> z_or_y: array<vec4<f32>>;          // forward: z, backward: y
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;              // backward only
@group(0) @binding(4) var<storage, read_write> out_pairs: array<vec4<f32>>; // forward: y, backward: dz
@group(0) @binding(5) var<storage, read_write> d_angles: array<vec2<f32>>;  // backward only

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 2u < params.pairs) { out_pairs[q] = rotate_two(z_or_y[q], angles[q]); }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 2u < params.pairs) {
      let y = z_or_y[q];
      let u = dy[q];
      out_pairs[q] = rotate_two(u, -angles[q]);
      d_angles[q] = vec2(u.y * y.x - u.x * y.y, u.w * y.z - u.z * y.w);
    }
  }
}
