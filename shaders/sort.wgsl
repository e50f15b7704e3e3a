// The stable sort of positions by key, 8 bits of the key a pass, least significant first.
//
//   count       counts[b, c] = how many keys of block c have digit b
//   scan        counts becomes its exclusive prefix sum: where the keys of (digit b, block c) go
//   scatter     order[counts[b, c]++] = position, for the keys of block c with digit b in their order
//   boundaries  offsets[e] = the first place in order whose key is at least e     (after more than one pass)
//
// Layouts       keys: [count];  previous, order: [count] positions;  counts: [buckets, blocks];  offsets: [limit + 1].
// Grid          count, scatter: one invocation a (digit, block) reads its whole block: no atomics, so the order is always the same.
//               scan: one workgroup.  boundaries: one invocation a key value, by bisection.  All but scan folded into (x, y).

override WORKGROUP: u32 = 64u;
override SCAN_WORKGROUP: u32 = 256u;
override FIRST_PASS: bool = true; // previous is the identity
override ONLY_PASS: bool = true; // buckets are key values: scatter knows the offsets

struct Params {
  count: u32,
  limit: u32,
  buckets: u32,
  shift: u32,
  block: u32,
  blocks: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> previous: array<u32>;
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> order: array<u32>;
@group(0) @binding(5) var<storage, read_write> offsets: array<u32>;

var<workgroup> partial: array<u32, SCAN_WORKGROUP>;

fn position_at(place: u32) -> u32 {
  if (FIRST_PASS) { return place; }
  return previous[place];
}

// A key that is out of range counts as the largest, so that every place stays in bounds.
fn digit_of(position: u32) -> u32 {
  return (min(keys[position], params.limit - 1u) >> params.shift) % params.buckets;
}

@compute @workgroup_size(WORKGROUP)
fn count(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let cell = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (cell >= params.buckets * params.blocks) { return; }
  let bucket = cell / params.blocks;
  let start = cell % params.blocks * params.block;
  let end = min(start + params.block, params.count);
  var found = 0u;
  for (var place = start; place < end; place++) {
    found += select(0u, 1u, digit_of(position_at(place)) == bucket);
  }
  counts[cell] = found;
}

@compute @workgroup_size(SCAN_WORKGROUP)
fn scan(@builtin(local_invocation_index) local: u32) {
  let cells = params.buckets * params.blocks;
  let share = (cells + SCAN_WORKGROUP - 1u) / SCAN_WORKGROUP;
  let start = min(local * share, cells);
  let end = min(start + share, cells);
  var sum = 0u;
  for (var cell = start; cell < end; cell++) { sum += counts[cell]; }
  partial[local] = sum;
  for (var distance = 1u; distance < SCAN_WORKGROUP; distance *= 2u) {
    workgroupBarrier();
    var before = 0u;
    if (local >= distance) { before = partial[local - distance]; }
    workgroupBarrier();
    partial[local] += before;
  }
  workgroupBarrier();
  var running = partial[local] - sum;
  for (var cell = start; cell < end; cell++) {
    let here = counts[cell];
    counts[cell] = running;
    running += here;
  }
}

@compute @workgroup_size(WORKGROUP)
fn scatter(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let cell = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (cell >= params.buckets * params.blocks) { return; }
  let bucket = cell / params.blocks;
  let block = cell % params.blocks;
  let start = block * params.block;
  let end = min(start + params.block, params.count);
  var next = counts[cell];
  if (ONLY_PASS) {
    if (block == 0u) { offsets[bucket] = next; }
    if (cell == 0u) { offsets[params.limit] = params.count; }
  }
  for (var place = start; place < end; place++) {
    let position = position_at(place);
    if (digit_of(position) == bucket) {
      order[next] = position;
      next++;
    }
  }
}

@compute @workgroup_size(WORKGROUP)
fn boundaries(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let key = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (key > params.limit) { return; }
  var low = 0u;
  var high = params.count;
  while (low < high) {
    let middle = (low + high) / 2u;
    if (min(keys[previous[middle]], params.limit - 1u) < key) { low = middle + 1u; } else { high = middle; }
  }
  offsets[key] = low;
}
