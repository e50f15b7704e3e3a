// Rows of a table by index.
//
//   forward     y[i, :] = x[ids[i], :]                                                    (x is the table)
//   backward    y[v, :] = sum over the positions i with ids[i] = v of x[i, :]                (x is dy, y the table's gradient)
//
// Layouts       table: [rows, width];  ids: [count] i32;  order: positions sorted by id;  offsets: [rows + 1], where each id starts.
// Grid          one invocation an element of y, folded into (x, y). Backward walks the sorted positions: no atomics.

override WORKGROUP: u32 = 64u;

struct Params {
  elements: u32,
  width: u32,
  rows: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read> order: array<u32>;
@group(0) @binding(5) var<storage, read> offsets: array<u32>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  let row = min(ids[element / params.width], params.rows - 1u);
  y[element] = x[row * params.width + element % params.width];
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  let row = element / params.width;
  let column = element % params.width;
  var sum = 0.0;
  let end = offsets[row + 1u];
  for (var place = offsets[row]; place < end; place++) { sum += x[order[place] * params.width + column]; }
  y[element] = sum;
}
