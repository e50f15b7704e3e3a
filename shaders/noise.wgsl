// Multiplicative noise, made anew wherever it is needed and never stored. Element q of the operation with number `stream` has
//
//   bits        word q % 2 of threefry(key = random, counter = (q / 2, stream)),       random = (seed, step)
//   dropout     y = x scale if bits >= threshold, else 0         threshold = round(p 2^32),  scale = 1 / (1 - p)
//   jitter      y = x (1 - e + 2 e u),   u = (bits >> 8) / 2^24 in [0, 1)                            (JITTER)
//
// The gradient of both is the operation itself on dy: the bits are the same.
//
// Layouts       x, y: [elements] f32, read as vec4s: every buffer is a multiple of 16 bytes, what is past the end is never used.
// Grid          one invocation QUADS vec4s, two blocks of random words; folded into (x, y) because a dimension stops at 65,535 workgroups.

override WORKGROUP: u32 = 64u;
override QUADS: u32 = 1u; // vec4s of an invocation, WORKGROUP apart
override JITTER: bool = false;

struct Params {
  elements: u32,
  stream: u32,
  threshold: u32,
  scale: f32, // dropout: 1 / (1 - p), jitter: e
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> random: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP * QUADS + local;
  for (var turn = 0u; turn < QUADS; turn++) {
    let q = first + turn * WORKGROUP;
    if (q * 4u < params.elements) {
      let key = vec2(random[0], random[1]);
      let bits = vec4(threefry(key, vec2(2u * q, params.stream)), threefry(key, vec2(2u * q + 1u, params.stream)));
      let v = x[q];
      if (JITTER) {
        let u = vec4<f32>(bits >> vec4(8u)) * 5.9604644775390625e-8;
        y[q] = v * (1.0 + params.scale * (2.0 * u - 1.0));
      } else {
        y[q] = select(vec4(0.0), v * params.scale, bits >= vec4(params.threshold));
      }
    }
  }
}
