// Rows of a table by index.
//
//   forward     y[i, :] = x[ids[i], :]                                                    (x is the table)
//   backward    y[v, :] = sum over the positions i with ids[i] = v of x[i, :]                (x is dy, y the table's gradient)
//
// Layouts       table: [rows, width];  ids: [count] i32;  order: positions sorted by id;  offsets: [rows + 1], where each id starts.
// Grid          one invocation an element of y, folded into (x, y). Backward walks the sorted positions: no atomics.

override WORKGROUP: u32 = 64u;

const CHUNK = 1024u;

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

fn term(place: u32, column: u32) -> f32 {
  return x[order[place] * params.width + column];
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let element = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (element >= params.elements) { return; }
  let row = element / params.width;
  let column = element % params.width;
  // In chunks, because one id may have very many places; by fours, because software drivers cut long loops short.
  var sum = 0.0;
  let end = offsets[row + 1u];
  var place = offsets[row];
  while (place < end) {
    let stop = min(place + CHUNK, end);
    var four = vec4(0.0);
    for (; place + 4u <= stop; place += 4u) {
      four += vec4(term(place, column), term(place + 1u, column), term(place + 2u, column), term(place + 3u, column));
    }
    for (; place < stop; place++) { four.x += term(place, column); }
    sum += (four.x + four.y) + (four.z + four.w);
  }
  y[element] = sum;
}
