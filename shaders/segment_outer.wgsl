// Weight gradients by expert segment:   dW[e] = scale sum over the pairs p of e of g[p] left[p / left_share] right[p / right_share]^T
//
// Layouts       left: [rows, a];  right: [rows, b];  order: pairs sorted by expert;  offsets: where each expert's pairs start;
//               gates: [pairs] (GATED, else 1);  dW: [experts, a, b].  rows: the row of right that a pair reads (MAPPED), in place of
//               p / right_share. A segment after those of the experts is of pairs that belong to none, and not read.
//               left and right are read as vec4s (ALIGNED: every row starts at a multiple of 4), or element by element.
// Grid          one workgroup for LANES_LEFT x LANES_RIGHT tiles of 4 x 4 of one expert's gradient; folded into (x, y).
// Work          an invocation walks its expert's pairs in sorted order: no atomics, and the order of the sum is always the same.

override LANES_LEFT: u32 = 4u;
override LANES_RIGHT: u32 = 16u;
override ALIGNED: bool = true;
override GATED: bool = true;
override MAPPED: bool = false;

struct Params {
  experts: u32,
  left: u32,
  right: u32,
  left_share: u32,
  right_share: u32,
  right_rows: u32,
  scale: f32,
  left_groups: u32,
  right_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> right: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read> gates: array<f32>;
@group(0) @binding(6) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(7) var<storage, read> rows: array<u32>;

fn left_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = left[index >> 2u][index & 3u]; }
  return value;
}

fn right_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = right[index >> 2u][index & 3u]; }
  return value;
}

fn left_block(row: u32, i: u32) -> vec4<f32> {
  let at = row * params.left + i;
  if (ALIGNED) { return left[at >> 2u]; }
  let rest = params.left - i;
  return vec4(left_element(at, true), left_element(at + 1u, rest > 1u), left_element(at + 2u, rest > 2u),
    left_element(at + 3u, rest > 3u));
}

fn right_block(row: u32, i: u32) -> vec4<f32> {
  let at = row * params.right + i;
  if (ALIGNED) { return right[at >> 2u]; }
  let rest = params.right - i;
  return vec4(right_element(at, true), right_element(at + 1u, rest > 1u), right_element(at + 2u, rest > 2u),
    right_element(at + 3u, rest > 3u));
}

fn store_row(base: u32, row: u32, column: u32, values: vec4<f32>) {
  if (row < params.left) {
    let at = base + row * params.right + column;
    let rest = params.right - column;
    let v = params.scale * values;
    gradient[at] = v.x;
    if (rest > 1u) { gradient[at + 1u] = v.y; }
    if (rest > 2u) { gradient[at + 2u] = v.z; }
    if (rest > 3u) { gradient[at + 3u] = v.w; }
  }
}

@compute @workgroup_size(LANES_RIGHT, LANES_LEFT)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let rest = group / params.right_groups;
  let column = ((group % params.right_groups) * LANES_RIGHT + local.x) * 4u;
  let row = ((rest % params.left_groups) * LANES_LEFT + local.y) * 4u;
  let expert = rest / params.left_groups;
  if (expert >= params.experts || row >= params.left || column >= params.right) { return; }

  var g0 = vec4(0.0);
  var g1 = vec4(0.0);
  var g2 = vec4(0.0);
  var g3 = vec4(0.0);
  let end = offsets[expert + 1u];
  for (var place = offsets[expert]; place < end; place++) {
    let pair = order[place];
    var l = left_block(pair / params.left_share, row);
    var right_row = pair / params.right_share;
    if (MAPPED) { right_row = min(rows[pair], params.right_rows - 1u); }
    let r = right_block(right_row, column);
    if (GATED) { l *= gates[pair]; }
    g0 += l.x * r;
    g1 += l.y * r;
    g2 += l.z * r;
    g3 += l.w * r;
  }
  let base = expert * params.left * params.right;
  store_row(base, row, column, g0);
  store_row(base, row + 1u, column, g1);
  store_row(base, row + 2u, column, g2);
  store_row(base, row + 3u, column, g3);
}
