// The stable sort of positions by key.
//
//   whole       all of it in one launch, where one workgroup is enough
//
// Else by digits of the key, least significant first, each in three launches:
//   count       counts[d, b] = how many places of block b have digit d
//   scan        counts becomes its exclusive prefix sum: where the places of (digit d, block b) go
//   scatter     order[counts[d, b] + how many of the block with digit d came before] = position
//   boundaries  offsets[e] = the first place in order whose key is at least e     (after more than one pass)
//
// Layouts       keys: [count];  previous, order: [count] positions;  counts: [digits, blocks];  offsets: [limit + 1].
// Grid          whole, scan: one workgroup.  count, scatter: a workgroup a block of chunks x share places, which each invocation walks for its
//               own chunk alone: no atomics, so the order is always the same.  boundaries: one invocation a key value, by
//               bisection.  All but whole and scan folded into (x, y).

override WORKGROUP: u32 = 128u;
override SCAN_WORKGROUP: u32 = 256u;
override FIRST_PASS: bool = true; // previous is the identity
override ONLY_PASS: bool = true; // digits are key values: scatter knows the offsets

struct Params {
  count: u32,
  limit: u32,
  digits: u32,
  shift: u32,
  chunks: u32,
  share: u32,
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
  return (min(keys[position], params.limit - 1u) >> params.shift) % params.digits;
}

@compute @workgroup_size(WORKGROUP)
fn whole(@builtin(local_invocation_index) local: u32) {
  sort_all(local);
}

@compute @workgroup_size(WORKGROUP)
fn count(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let block = workgroup.y * params.groups_per_row + workgroup.x;
  if (block >= params.blocks) { return; }
  count_chunk(local, chunk_places(local, block * params.chunks * params.share));
  workgroupBarrier();
  for (var row = local; row < rows(); row += WORKGROUP) {
    var sum = 0u;
    for (var chunk = 0u; chunk < params.chunks; chunk++) { sum += cells[row * columns() + chunk]; }
    counts[2u * row * params.blocks + block] = sum & 0xffffu;
    if (2u * row + 1u < params.digits) { counts[(2u * row + 1u) * params.blocks + block] = sum >> 16u; }
  }
}

@compute @workgroup_size(SCAN_WORKGROUP)
fn scan(@builtin(local_invocation_index) local: u32) {
  let total = params.digits * params.blocks;
  let share = (total + SCAN_WORKGROUP - 1u) / SCAN_WORKGROUP;
  let start = min(local * share, total);
  let end = min(start + share, total);
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
  let block = workgroup.y * params.groups_per_row + workgroup.x;
  if (block >= params.blocks) { return; }
  let places = chunk_places(local, block * params.chunks * params.share);
  for (var digit = local; digit < params.digits; digit += WORKGROUP) {
    let start = counts[digit * params.blocks + block];
    cells[start_cell(digit)] = start;
    if (ONLY_PASS && block == 0u) { offsets[digit] = start; }
  }
  if (ONLY_PASS && block == 0u && local == 0u) { offsets[params.limit] = params.count; }
  count_chunk(local, places);
  workgroupBarrier();
  scan_rows(local);
  workgroupBarrier();
  scatter_chunk(local, places);
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
