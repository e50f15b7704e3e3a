// The capacity of experts: of a segment with more than `capacity` pairs, the rest is dropped.
//
//   forward     BY_GATE: the pairs with the largest gates stay, of equal ones the earlier;   else: the first in the order of the tokens
//               a pair that stays keeps its expert and gate; a dropped one gets the expert `experts` (none) and the gate 0
//   backward    d_gates = upstream where the pair stayed, 0 where it was dropped
//
// Layouts       chosen, kept: [pairs] i32;  gates, kept_gates, upstream, d_gates: [pairs];  order: pairs sorted by expert, in the
//               order of the tokens;  offsets: where each expert's pairs start.
// Grid          forward: one workgroup an expert.  backward: one invocation a pair.  Folded into (x, y).
// Work          BY_GATE finds the capacity-th largest gate bit by bit, then the place up to which its equals stay, also bit by bit:
//               2 x 32 counts of the segment, whatever its length, and nothing is sorted or stored.

override WORKGROUP: u32 = 256u;
override BY_GATE: bool = false;

struct Params {
  pairs: u32,
  experts: u32,
  capacity: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> chosen: array<u32>;
@group(0) @binding(2) var<storage, read> gates: array<f32>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> kept: array<u32>;
@group(0) @binding(6) var<storage, read_write> kept_gates: array<f32>;
@group(0) @binding(7) var<storage, read> given_kept: array<u32>;
@group(0) @binding(8) var<storage, read> upstream: array<f32>;
@group(0) @binding(9) var<storage, read_write> d_gates: array<f32>;

var<workgroup> count_tree: array<u32, WORKGROUP>;

// The sum over the workgroup, for every invocation of it.
fn workgroup_count(value: u32, local: u32) -> u32 {
  workgroupBarrier();
  count_tree[local] = value;
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local < half) { count_tree[local] += count_tree[local + half]; }
  }
  workgroupBarrier();
  return count_tree[0];
}

// The order of gates as the order of integers: gates are not negative, so their bits are in order. A NaN counts as 0.
fn gate_key(pair: u32) -> u32 {
  let bits = bitcast<u32>(gates[pair]);
  return select(bits, 0u, bits > 0x7f800000u);
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let expert = workgroup.y * params.groups_per_row + workgroup.x;
  if (expert >= params.experts) { return; }
  let start = offsets[expert];
  let end = offsets[expert + 1u];
  // the pairs before this place stay, and with BY_GATE those of larger gates
  var place_limit = min(start + params.capacity, end);
  var key_limit = 0u;
  if (BY_GATE) {
    // the largest key that at least `capacity` pairs reach; 0 if there are fewer
    for (var bit = 0u; bit < 31u; bit++) {
      let candidate = key_limit | (0x40000000u >> bit);
      var found = 0u;
      for (var place = start + local; place < end; place += WORKGROUP) {
        found += select(0u, 1u, gate_key(order[place]) >= candidate);
      }
      let reached = workgroup_count(found, local);
      key_limit = select(key_limit, candidate, reached >= params.capacity);
    }
    var larger = 0u;
    for (var place = start + local; place < end; place += WORKGROUP) {
      larger += select(0u, 1u, gate_key(order[place]) > key_limit);
    }
    // fewer than `capacity` are larger: so many equals stay beside them
    let equals = params.capacity - min(workgroup_count(larger, local), params.capacity);
    // the largest length of which the first so many places hold no more equals than that
    var length = 0u;
    for (var bit = 0u; bit < 32u; bit++) {
      let candidate = length | (0x80000000u >> bit);
      let candidate_end = start + min(candidate, end - start);
      var found = 0u;
      for (var place = start + local; place < candidate_end; place += WORKGROUP) {
        found += select(0u, 1u, gate_key(order[place]) == key_limit);
      }
      let holds = workgroup_count(found, local);
      length = select(length, candidate, holds <= equals);
    }
    place_limit = start + min(length, end - start);
  }
  for (var place = start + local; place < end; place += WORKGROUP) {
    let pair = order[place];
    var stays = place < place_limit;
    if (BY_GATE) {
      let key = gate_key(pair);
      stays = key > key_limit || (key == key_limit && stays);
    }
    kept[pair] = select(params.experts, chosen[pair], stays);
    kept_gates[pair] = select(0.0, gates[pair], stays);
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let pair = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (pair >= params.pairs) { return; }
  d_gates[pair] = select(0.0, upstream[pair], given_kept[pair] < params.experts);
}
