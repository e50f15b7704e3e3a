// Arithmetic on one tensor:   y[i] = f(x[i])
//
//   FUNCTION      0 scale x + offset    1 x^2    2 sqrt x    3 1 / x    4 exp x    5 ln x    6 tanh x    7 1 - tanh^2 x
//                 8 1 / (1 + exp(-x))
//
// Layouts       both [elements] f32, as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS vec4s, folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override FUNCTION: u32 = 0u;

struct Params {
  elements: u32,
  scale: f32,
  offset: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

// WGSL promises its own tanh only through sinh x / cosh x, which overflows. e^(-2 |x|) cannot, but below 0.7 the difference 1 - e loses
// digits: there a polynomial, fitted for this file, is right to 1.3e-7 of the value, as the quotient is above.
fn hyperbolic_tangent(v: vec4<f32>) -> vec4<f32> {
  let e = exp(-2.0 * abs(v));
  let far = sign(v) * (1.0 - e) / (1.0 + e);
  let v2 = v * v;
  let polynomial = -3.333332086e-1 + v2 * (1.333205563e-1 + v2 * (-5.375529643e-2 + v2 * (2.059587038e-2 - v2 * 5.577822113e-3)));
  return select(far, v + v * v2 * polynomial, abs(v) < vec4(0.7));
}

// 4 e / (1 + e)^2 keeps its digits where tanh is nearly 1.
fn hyperbolic_tangent_slope(v: vec4<f32>) -> vec4<f32> {
  let e = exp(-2.0 * abs(v));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let v = x[q];
      if (FUNCTION == 0u) {
        y[q] = params.scale * v + params.offset;
      } else if (FUNCTION == 1u) {
        y[q] = v * v;
      } else if (FUNCTION == 2u) {
        y[q] = sqrt(v);
      } else if (FUNCTION == 3u) {
        y[q] = 1.0 / v;
      } else if (FUNCTION == 4u) {
        y[q] = exp(v);
      } else if (FUNCTION == 5u) {
        y[q] = log(v);
      } else if (FUNCTION == 6u) {
        y[q] = hyperbolic_tangent(v);
      } else if (FUNCTION == 7u) {
        y[q] = hyperbolic_tangent_slope(v);
      } else {
        // only the exponential of a number that is not positive is taken
        let e = exp(-abs(v));
        y[q] = select(e, vec4(1.0), v >= vec4(0.0)) / (1.0 + e);
      }
    }
  }
}
