// The sum of the pairs' rows, back in the order of the tokens:
//
//   forward     y[row, :] (+)= scale sum over the slots j of the row's token of g[t, j] u[t slots + j, :]
//               MAPPED: a token has rows_per_token rows, and only the pairs whose row it is are counted
//   backward    du[p, :] = g[p] dy[row(p), :]        dg[p] = <dy[row(p), :], u[p, :]>        both 0 for a pair of no row
//
// Layouts       u, du: [pairs, width];  gates, dg: [tokens, slots] (GATED, else 1);  rows: [tokens, slots], an index past the last row
//               for a pair that belongs to none;  y, dy: [tokens rows_per_token, width].
// Grid          forward: one invocation an element of y (forward_four: four of them); neighbours read neighbours, the slots are summed in their order: no atomics.
//               backward: one workgroup a pair.  Folded into (x, y).

override WORKGROUP: u32 = 64u;
override GATED: bool = true;
override MAPPED: bool = true;
override ACCUMULATE: bool = false;

struct Params {
  rows: u32,
  rows_per_token: u32,
  slots: u32,
  width: u32,
  scale: f32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> u: array<f32>;
@group(0) @binding(2) var<storage, read> gates: array<f32>;
@group(0) @binding(3) var<storage, read> rows: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read> dy: array<f32>;
@group(0) @binding(6) var<storage, read_write> du: array<f32>;
@group(0) @binding(7) var<storage, read_write> d_gates: array<f32>;
@group(0) @binding(8) var<storage, read> u_fours: array<vec4<f32>>;         // forward_four only: u
@group(0) @binding(9) var<storage, read_write> y_fours: array<vec4<f32>>;   // forward_four only: y

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.rows * params.width) { return; }
  let row = element / params.width;
  let column = element % params.width;
  let first_slot = row / params.rows_per_token * params.slots;
  var sum = 0.0;
  for (var pair = first_slot; pair < first_slot + params.slots; pair++) {
    if (MAPPED) {
      if (rows[pair] != row) { continue; }
    }
    var factor = params.scale;
    if (GATED) { factor *= gates[pair]; }
    sum += factor * u[pair * params.width + column];
  }
  if (ACCUMULATE) { y[element] += sum; } else { y[element] = sum; }
}

// forward where the width is a multiple of 4: an invocation has four neighbours.
@compute @workgroup_size(WORKGROUP)
fn forward_four(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let four = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let fours = params.width / 4u;
  if (four >= params.rows * fours) { return; }
  let row = four / fours;
  let column = four % fours;
  let first_slot = row / params.rows_per_token * params.slots;
  var sum = vec4(0.0);
  for (var pair = first_slot; pair < first_slot + params.slots; pair++) {
    if (MAPPED) {
      if (rows[pair] != row) { continue; }
    }
    var factor = params.scale;
    if (GATED) { factor *= gates[pair]; }
    sum += factor * u_fours[pair * fours + column];
  }
  if (ACCUMULATE) { y_fours[four] += sum; } else { y_fours[four] = sum; }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let pair = workgroup.y * params.groups_per_row + workgroup.x;
  if (pair >= params.rows / params.rows_per_token * params.slots) { return; }
  let inside = rows[pair] < params.rows;
  let row = min(rows[pair], params.rows - 1u);
  let gate = select(0.0, gates[pair], inside);
  var product = 0.0;
  for (var column = local; column < params.width; column += WORKGROUP) {
    let upstream = dy[row * params.width + column];
    let at = pair * params.width + column;
    product += upstream * u[at];
    du[at] = gate * upstream;
  }
  let sum = workgroup_sum(product, local);
  if (local == 0u) { d_gates[pair] = select(0.0, sum, inside); }
}
