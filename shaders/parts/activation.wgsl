// Activations of feed-forward experts and their derivatives, four at a time:
//
//   ACTIVATION    0 silu         x sigmoid(x)
//                 1 gelu         x Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2
//                 2 gelu_tanh    x sigmoid(2 c (x + 0.044715 x^3)),  c = sqrt(2 / pi): equals x (1 + tanh(c (...))) / 2
//
// Numbers       Only exponentials of numbers that are not positive are taken. WGSL has no erf: Phi comes from a polynomial for
//               erfc(t) exp(t^2) / u in v = 2 u - 1, u = 1 / (1 + t / 2), t >= 0, fitted at Chebyshev nodes (relative error 1.2e-8),
//               so that the far tail keeps its digits. In f32 Phi is right to 1.3e-7, and to 3.5e-6 of itself down to x = -6.

override ACTIVATION: u32 = 0u;

fn sigmoid(x: vec4<f32>) -> vec4<f32> {
  let e = exp(-abs(x));
  return select(e, vec4(1.0), x >= vec4(0.0)) / (1.0 + e);
}

fn normal_cdf(x: vec4<f32>) -> vec4<f32> {
  let t = 0.70710678 * min(abs(x), vec4(30.0)); // beyond 30 the tail is 0, and t^2 would only overflow
  let u = 1.0 / (1.0 + 0.5 * t);
  let v = 2.0 * u - 1.0;
  var q = vec4(4.216119723e-05);
  q = q * v - 3.660187694e-05;
  q = q * v - 2.993827122e-04;
  q = q * v + 4.306704884e-04;
  q = q * v + 1.529157161e-03;
  q = q * v - 3.243451918e-03;
  q = q * v - 1.075162619e-02;
  q = q * v + 1.822166943e-02;
  q = q * v + 1.397357335e-01;
  q = q * v + 3.435803187e-01;
  q = q * v + 5.107913569e-01;
  let tail = 0.5 * u * q * exp(-t * t);
  return select(1.0 - tail, tail, x < vec4(0.0));
}

// Beyond 30 the sigmoid is 0 or 1 and x^3 would only overflow.
fn tanh_argument(x: vec4<f32>) -> vec4<f32> {
  let y = clamp(x, vec4(-30.0), vec4(30.0));
  return 1.5957691216 * (y + 0.044715 * y * y * y);
}

fn activate(x: vec4<f32>) -> vec4<f32> {
  if (ACTIVATION == 0u) { return x * sigmoid(x); }
  if (ACTIVATION == 1u) { return x * normal_cdf(x); }
  return x * sigmoid(tanh_argument(x));
}

fn activation_derivative(x: vec4<f32>) -> vec4<f32> {
  if (ACTIVATION == 0u) { return sigmoid(x) * (1.0 + x * sigmoid(-x)); }
  if (ACTIVATION == 1u) {
    // beyond 30 the density is 0 and x^2 would only overflow
    let y = clamp(x, vec4(-30.0), vec4(30.0));
    return normal_cdf(x) + 0.39894228 * y * exp(-0.5 * y * y);
  }
  let y = clamp(x, vec4(-30.0), vec4(30.0));
  let u = tanh_argument(x);
  return sigmoid(u) * (1.0 + sigmoid(-u) * y * 1.5957691216 * (1.0 + 0.134145 * y * y));
}
