// The hidden numbers of feed-forward experts, by segments:
//
//   plan        table = [offsets | order | the row that each place of the order reads]
//   forward     gate[p] = Wg[e] xg[row(p)],  up[p] = Wu[e] xu[row(p)],  h[p] = f(gate[p]) up[p]     for the pairs p of every expert e
//               without GATED: h[p] = f(gate[p])
//               row(p) = p / share, or rows[p] with MAPPED
//
// Layouts       gate_x, up_x: [rows, in], one buffer bound twice where they are the same (SHARED);  weights: [experts, out, in];
//               order: pairs sorted by expert;  offsets: where each segment's pairs start;  gate, up, h: [pairs, out], by pair.
//               There may be one segment more than experts: its pairs belong to none and get zeros.
//               x and weights are read as vec4s (ALIGNED: every row starts at a multiple of 4), or element by element.
// Grid          plan: one invocation a word.  forward: one workgroup for LANES_PAIRS x LANES_OUT tiles of PAIRS x 4 outputs; tiles
//               of all segments, an upper bound of them, times the tiles along out.  Folded into (x, y).
// Work          both products and their activation are one kernel: gate and up are written for the backward pass but never read
//               here. An invocation keeps a tile of either in named vec4s and goes through in by 4: with SHARED 12 vec4 loads for 128
//               multiply-adds, or with PAIRS = 8 16 for 256. Eight pairs spill on the Apple M1: they are for software adapters.
//               A kernel may bind 8 storage buffers everywhere: that is why plan puts three tables into one.

override WORKGROUP: u32 = 64u;
override LANES_PAIRS: u32 = 8u;
override LANES_OUT: u32 = 8u;
override PAIRS: u32 = 4u; // or 8
override ALIGNED: bool = true;
override GATED: bool = true;
override SHARED: bool = true;
override MAPPED: bool = false;

struct Params {
  pairs: u32,
  rows: u32,
  experts: u32,
  segments: u32,
  out: u32,
  in: u32,
  share: u32,
  out_groups: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate_x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gate_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> up_x: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> up_weight: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read_write> h: array<f32>;
@group(0) @binding(7) var<storage, read_write> gate: array<f32>;
@group(0) @binding(8) var<storage, read_write> up: array<f32>;
@group(0) @binding(9) var<storage, read> order: array<u32>;                // plan only
@group(0) @binding(10) var<storage, read> offsets: array<u32>;             // plan only
@group(0) @binding(11) var<storage, read> row_of_pair: array<u32>;         // plan only
@group(0) @binding(12) var<storage, read_write> table_result: array<u32>;  // plan only

@compute @workgroup_size(WORKGROUP)
fn plan(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let word = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  let head = params.segments + 1u;
  if (word >= head + 2u * params.pairs) { return; }
  if (word < head) {
    table_result[word] = offsets[word];
    return;
  }
  let place = word - head;
  if (place < params.pairs) {
    table_result[word] = order[place];
    return;
  }
  let pair = order[place - params.pairs];
  var row = pair / params.share;
  if (MAPPED) { row = row_of_pair[pair]; }
  table_result[word] = min(row, params.rows - 1u);
}

fn segment_start(expert: u32) -> u32 {
  return table[expert];
}

// Four neighbours in a row, of which `left` are inside it.
fn gate_x_block(at: u32, left: u32) -> vec4<f32> {
  if (ALIGNED) { return gate_x[at >> 2u]; }
  var block = vec4(gate_x[at >> 2u][at & 3u], 0.0, 0.0, 0.0);
  if (left > 1u) { block.y = gate_x[(at + 1u) >> 2u][(at + 1u) & 3u]; }
  if (left > 2u) { block.z = gate_x[(at + 2u) >> 2u][(at + 2u) & 3u]; }
  if (left > 3u) { block.w = gate_x[(at + 3u) >> 2u][(at + 3u) & 3u]; }
  return block;
}

fn gate_weight_block(at: u32, left: u32) -> vec4<f32> {
  if (ALIGNED) { return gate_weight[at >> 2u]; }
  var block = vec4(gate_weight[at >> 2u][at & 3u], 0.0, 0.0, 0.0);
  if (left > 1u) { block.y = gate_weight[(at + 1u) >> 2u][(at + 1u) & 3u]; }
  if (left > 2u) { block.z = gate_weight[(at + 2u) >> 2u][(at + 2u) & 3u]; }
  if (left > 3u) { block.w = gate_weight[(at + 3u) >> 2u][(at + 3u) & 3u]; }
  return block;
}

fn up_x_block(at: u32, left: u32) -> vec4<f32> {
  if (ALIGNED) { return up_x[at >> 2u]; }
  var block = vec4(up_x[at >> 2u][at & 3u], 0.0, 0.0, 0.0);
  if (left > 1u) { block.y = up_x[(at + 1u) >> 2u][(at + 1u) & 3u]; }
  if (left > 2u) { block.z = up_x[(at + 2u) >> 2u][(at + 2u) & 3u]; }
  if (left > 3u) { block.w = up_x[(at + 3u) >> 2u][(at + 3u) & 3u]; }
  return block;
}

fn up_weight_block(at: u32, left: u32) -> vec4<f32> {
  if (ALIGNED) { return up_weight[at >> 2u]; }
  var block = vec4(up_weight[at >> 2u][at & 3u], 0.0, 0.0, 0.0);
  if (left > 1u) { block.y = up_weight[(at + 1u) >> 2u][(at + 1u) & 3u]; }
  if (left > 2u) { block.z = up_weight[(at + 2u) >> 2u][(at + 2u) & 3u]; }
  if (left > 3u) { block.w = up_weight[(at + 3u) >> 2u][(at + 3u) & 3u]; }
  return block;
}

// Four pairs, four outputs each.
struct Tile {
  r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>,
}

// x: four columns of four rows, one a column of the matrix.
fn multiply_add(t: ptr<function, Tile>, w: mat4x4<f32>, x: mat4x4<f32>) {
  (*t).r0 += w * x[0];
  (*t).r1 += w * x[1];
  (*t).r2 += w * x[2];
  (*t).r3 += w * x[3];
}

fn gate_rows(at: vec4<u32>, left: u32) -> mat4x4<f32> {
  return mat4x4(gate_x_block(at.x, left), gate_x_block(at.y, left), gate_x_block(at.z, left), gate_x_block(at.w, left));
}

fn up_rows(at: vec4<u32>, left: u32) -> mat4x4<f32> {
  return mat4x4(up_x_block(at.x, left), up_x_block(at.y, left), up_x_block(at.z, left), up_x_block(at.w, left));
}

// Places are clamped to the end of the segment: those past it compute what the last one does and are not stored.
fn pair_at(place: u32, last: u32) -> u32 {
  return table[params.segments + 1u + min(place, last)];
}

// Where four rows of x start.
fn starts_at(place: u32, last: u32) -> vec4<u32> {
  let reads = params.segments + 1u + params.pairs + min(vec4(place, place + 1u, place + 2u, place + 3u), vec4(last));
  return vec4(table[reads.x], table[reads.y], table[reads.z], table[reads.w]) * params.in;
}

fn store_row(place: u32, end: u32, out: u32, g: vec4<f32>, u: vec4<f32>) {
  if (place < end) {
    let at = pair_at(place, end) * params.out + out;
    let left = params.out - out;
    var result = activate(g);
    if (GATED) { result *= u; }
    h[at] = result.x;
    gate[at] = g.x;
    if (GATED) { up[at] = u.x; }
    if (left > 1u) {
      h[at + 1u] = result.y;
      gate[at + 1u] = g.y;
      if (GATED) { up[at + 1u] = u.y; }
    }
    if (left > 2u) {
      h[at + 2u] = result.z;
      gate[at + 2u] = g.z;
      if (GATED) { up[at + 2u] = u.z; }
    }
    if (left > 3u) {
      h[at + 3u] = result.w;
      gate[at + 3u] = g.w;
      if (GATED) { up[at + 3u] = u.w; }
    }
  }
}

fn store_tile(place: u32, end: u32, out: u32, g: Tile, u: Tile) {
  store_row(place, end, out, g.r0, u.r0);
  store_row(place + 1u, end, out, g.r1, u.r1);
  store_row(place + 2u, end, out, g.r2, u.r2);
  store_row(place + 3u, end, out, g.r3, u.r3);
}

@compute @workgroup_size(LANES_OUT, LANES_PAIRS)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let group = workgroup.y * params.groups_per_row + workgroup.x;
  let tile = find_tile(group / params.out_groups, LANES_PAIRS * PAIRS);
  let out = ((group % params.out_groups) * LANES_OUT + local.x) * 4u;
  let place = tile.first + local.y * PAIRS;
  if (!tile.found || out >= params.out || place >= tile.end) { return; }

  let last = tile.end - 1u;
  let at = starts_at(place, last);
  let below_at = starts_at(place + 4u, last);
  let last_out = params.out - 1u;
  let base = tile.expert * params.out * params.in;
  let w0 = base + out * params.in;
  let w1 = base + min(out + 1u, last_out) * params.in;
  let w2 = base + min(out + 2u, last_out) * params.in;
  let w3 = base + min(out + 3u, last_out) * params.in;

  var g = Tile();
  var u = Tile();
  var g_below = Tile();
  var u_below = Tile();
  // no turn of the loop for pairs of no expert: they keep their zeros, and no weight is read
  let end = select(0u, params.in, tile.expert < params.experts);
  for (var i = 0u; i < end; i += 4u) {
    let left = params.in - i;
    let x = gate_rows(at + i, left);
    var x_below = mat4x4<f32>();
    if (PAIRS == 8u) { x_below = gate_rows(below_at + i, left); }
    let gate_w = transpose(mat4x4(gate_weight_block(w0 + i, left), gate_weight_block(w1 + i, left),
      gate_weight_block(w2 + i, left), gate_weight_block(w3 + i, left)));
    multiply_add(&g, gate_w, x);
    if (PAIRS == 8u) { multiply_add(&g_below, gate_w, x_below); }
    if (GATED) {
      let up_w = transpose(mat4x4(up_weight_block(w0 + i, left), up_weight_block(w1 + i, left),
        up_weight_block(w2 + i, left), up_weight_block(w3 + i, left)));
      if (SHARED) {
        multiply_add(&u, up_w, x);
        if (PAIRS == 8u) { multiply_add(&u_below, up_w, x_below); }
      } else {
        multiply_add(&u, up_w, up_rows(at + i, left));
        if (PAIRS == 8u) { multiply_add(&u_below, up_w, up_rows(below_at + i, left)); }
      }
    }
  }
  store_tile(place, tile.end, out, g, u);
  if (PAIRS == 8u) { store_tile(place + 4u, tile.end, out, g_below, u_below); }
}
