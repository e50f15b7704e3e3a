// Dynamic loss scaling: the loss is multiplied by a scale so that gradients in 16 bits do not vanish; where they overflow instead, the
// step is skipped and the scale made smaller.
//
//   current     scale = state[0]
//   update      overflow = the norm of the scaled gradients is not finite
//               overflow:  state = (scale backoff, 0, steps, skipped + 1),                      schedule' = unused, clip' = (0, 0)
//               else:      steps += 1, good += 1; after `interval` good steps scale *= growth and good = 0
//                          schedule' = (rate, 1 / (1 - beta1^steps), 1 / sqrt(1 - beta2^steps))
//                          n = norm / scale,  clip' = (n, min(1, max_norm / (n + 1e-6)) / scale)
//
// Layouts       state: scale, good, steps, skipped, as floats (exact to 2^24, where both corrections are 1);  norm: [norm, _] of the
//               scaled gradients;  schedule: [rate, _, _];  schedule', clip': what the optimiser reads. A clip factor of 0 means: skip.
// Grid          one invocation.

struct Params {
  growth: f32,
  backoff: f32,
  interval: f32,
  largest: f32,  // of the scale
  max_norm: f32,
  log_beta1: f32,
  log_beta2: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> given_state: array<f32>;         // current only
@group(0) @binding(2) var<storage, read> norm: array<f32>;                // update only
@group(0) @binding(3) var<storage, read> schedule: array<f32>;            // update only
@group(0) @binding(4) var<storage, read_write> state: array<f32>;         // update only
@group(0) @binding(5) var<storage, read_write> result: array<f32>;        // current: scale, update: schedule'
@group(0) @binding(6) var<storage, read_write> clip: array<f32>;          // update only

// 1 - exp(y) for y <= 0: near 0 by its series, because 1 - exp(y) would lose all its digits.
fn one_minus_exp(y: f32) -> f32 {
  if (y < -0.5) { return 1.0 - exp(max(y, -87.0)); }
  return -y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0 * (1.0 + y / 7.0))))));
}

@compute @workgroup_size(1)
fn current() {
  result[0] = given_state[0];
}

@compute @workgroup_size(1)
fn update() {
  let scale = state[0];
  // On bits: WGSL may assume that there is no infinity.
  let overflow = (bitcast<u32>(norm[0]) & 0x7f800000u) == 0x7f800000u;
  if (overflow) {
    state[0] = max(scale * params.backoff, 1.1754944e-38);
    state[1] = 0.0;
    state[3] = state[3] + 1.0;
    result[0] = 0.0;
    result[1] = 1.0;
    result[2] = 1.0;
    clip[0] = 0.0;
    clip[1] = 0.0;
    return;
  }
  let steps = state[2] + 1.0;
  let good = state[1] + 1.0;
  let grown = good >= params.interval;
  state[0] = select(scale, min(scale * params.growth, params.largest), grown);
  state[1] = select(good, 0.0, grown);
  state[2] = steps;
  result[0] = schedule[0];
  result[1] = 1.0 / one_minus_exp(steps * params.log_beta1);
  result[2] = inverseSqrt(one_minus_exp(steps * params.log_beta2));
  let n = norm[0] / scale;
  clip[0] = n;
  clip[1] = min(1.0, params.max_norm / (n + 1e-6)) / scale;
}
