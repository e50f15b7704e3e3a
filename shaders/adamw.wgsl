// One step of AdamW, in place:
//
//   g = gradient * clip
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   theta = theta (1 - rate decay) - rate correction1 m / (sqrt(v) correction2 + epsilon)
//
// Layouts       all [elements] f32, as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
//               schedule: rate, correction1 = 1 / (1 - beta1^t), correction2 = 1 / sqrt(1 - beta2^t), made on the host in f64:
//               1 - beta2^t loses all its digits in f32.  clip: norm, scale (CLIPPED); a scale of 0 skips the step.
// Grid          one invocation QUADS vec4s, folded into (x, y). 28 bytes an element: memory-bound.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override CLIPPED: bool = true;

struct Params {
  elements: u32,
  beta1: f32,
  beta2: f32,
  one_minus_beta1: f32,
  one_minus_beta2: f32,
  epsilon: f32,
  decay: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gradient: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> schedule: array<f32>;
@group(0) @binding(3) var<storage, read> clip: array<f32>;
@group(0) @binding(4) var<storage, read_write> theta: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> first: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> second: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  // A gradient that overflowed: its moments would never be finite again.
  if (CLIPPED) {
    if (clip[1] == 0.0) { return; }
  }
  let rate = schedule[0];
  let place = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = place + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      var g = gradient[q];
      if (CLIPPED) { g *= clip[1]; }
      let m = params.beta1 * first[q] + params.one_minus_beta1 * g;
      let v = params.beta2 * second[q] + params.one_minus_beta2 * g * g;
      let step = rate * schedule[1] * m / (sqrt(v) * schedule[2] + params.epsilon);
      first[q] = m;
      second[q] = v;
      theta[q] = theta[q] * (1.0 - rate * params.decay) - step;
    }
  }
}
