// The bias by which a router without a balance loss keeps its experts busy, in place:
//
//   b[e] += rate sign(mean - count[e])            count[e] = offsets[e + 1] - offsets[e],  mean = total / experts
//
// Layouts       b: [experts] f32;  offsets: where each expert's pairs start, before any is dropped.
// Grid          one invocation an expert.
// Numbers       count < total / experts is count < ceil(total / experts), and count > total / experts is count > floor(total / experts):
//               integers, exact for any number of pairs.

override WORKGROUP: u32 = 64u;

struct Params {
  experts: u32,
  rate: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> offsets: array<u32>;
@group(0) @binding(2) var<storage, read_write> bias: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let expert = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (expert >= params.experts) { return; }
  let total = offsets[params.experts];
  let floor = total / params.experts;
  let ceiling = floor + select(0u, 1u, total % params.experts > 0u);
  let count = offsets[expert + 1u] - offsets[expert];
  let direction = select(0.0, 1.0, count < ceiling) - select(0.0, 1.0, count > floor);
  bias[expert] += params.rate * direction;
}
