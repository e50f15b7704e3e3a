// Grouped expand:   y[t, :] (+)= scale sum over the slots j of g[t, j] W[e(t, j)] z[t slots + j, :]
//
// Layouts       z: [pairs, in];  weight: [experts, out, in] (OUT_IN) or [experts, in, out];  experts: [tokens, slots];
//               gates: [tokens, slots] (GATED, else 1);  y: [rows, out], added into (ACCUMULATE) or written: one row a token, or
//               rows_per_token of them, where row_of_pair says into which a pair is summed (MAPPED).
//               A pair whose expert is no expert adds nothing.
//               z and weight are read as vec4s (ALIGNED: every row starts at a multiple of 4), or element by element.
// Grid          one workgroup for LANES_ROWS rows x LANES_OUT blocks of 4 outputs; folded into (x, y).
// Work          an invocation sums over all slots of its row's token: nothing of size [pairs, out] is stored, the order is fixed.

override LANES_ROWS: u32 = 1u;
override LANES_OUT: u32 = 64u;
override OUT_IN: bool = true;
override ALIGNED: bool = true;
override GATED: bool = true;
override MAPPED: bool = false;
override ACCUMULATE: bool = true;

struct Params {
  rows: u32,
  rows_per_token: u32,
  slots: u32,
  experts: u32,
  out: u32,
  in: u32,
  scale: f32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> experts: array<u32>;
@group(0) @binding(4) var<storage, read> gates: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read> row_of_pair: array<u32>;

fn z_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = z[index >> 2u][index & 3u]; }
  return value;
}

fn weight_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = weight[index >> 2u][index & 3u]; }
  return value;
}

fn z_block(row: u32, i: u32) -> vec4<f32> {
  let at = row * params.in + i;
  if (ALIGNED) { return z[at >> 2u]; }
  let left = params.in - i;
  return vec4(z_element(at, true), z_element(at + 1u, left > 1u), z_element(at + 2u, left > 2u), z_element(at + 3u, left > 3u));
}

fn weight_block(base: u32, row: u32, j: u32, width: u32, inside: bool) -> vec4<f32> {
  let at = base + row * width + j;
  if (ALIGNED) { return weight[at >> 2u]; }
  return vec4(weight_element(at, inside), weight_element(at + 1u, inside & (j + 1u < width)),
    weight_element(at + 2u, inside & (j + 2u < width)), weight_element(at + 3u, inside & (j + 3u < width)));
}

fn store(at: u32, inside: bool, value: f32) {
  if (inside) {
    if (ACCUMULATE) { y[at] += value; } else { y[at] = value; }
  }
}

@compute @workgroup_size(LANES_OUT, LANES_ROWS)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let row = group / params.out_groups * LANES_ROWS + local.y;
  let out = ((group % params.out_groups) * LANES_OUT + local.x) * 4u;
  if (row >= params.rows || out >= params.out) { return; }
  let last_out = params.out - 1u;
  let o1 = min(out + 1u, last_out);
  let o2 = min(out + 2u, last_out);
  let o3 = min(out + 3u, last_out);

  var sum = vec4(0.0);
  for (var slot = 0u; slot < params.slots; slot++) {
    let pair = row / params.rows_per_token * params.slots + slot;
    let expert = experts[pair];
    if (expert >= params.experts) { continue; }
    if (MAPPED) {
      if (row_of_pair[pair] != row) { continue; }
    }
    let base = expert * params.out * params.in;
    var part = vec4(0.0);
    for (var i = 0u; i < params.in; i += 4u) {
      let latent = z_block(pair, i);
      if (OUT_IN) {
        part += vec4(
          dot(weight_block(base, out, i, params.in, true), latent), dot(weight_block(base, o1, i, params.in, true), latent),
          dot(weight_block(base, o2, i, params.in, true), latent), dot(weight_block(base, o3, i, params.in, true), latent));
      } else {
        part += latent.x * weight_block(base, i, out, params.out, true)
          + latent.y * weight_block(base, i + 1u, out, params.out, i + 1u < params.in)
          + latent.z * weight_block(base, i + 2u, out, params.out, i + 2u < params.in)
          + latent.w * weight_block(base, i + 3u, out, params.out, i + 3u < params.in);
      }
    }
    var factor = params.scale;
    if (GATED) { factor *= gates[pair]; }
    sum += factor * part;
  }
  let at = row * params.out + out;
  let left = params.out - out;
  store(at, true, sum.x);
  store(at + 1u, left > 1u, sum.y);
  store(at + 2u, left > 2u, sum.z);
  store(at + 3u, left > 3u, sum.w);
}
