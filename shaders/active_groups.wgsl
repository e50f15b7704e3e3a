// Which groups of experts a token uses:
//
//   groups[t, :]    the distinct groups e / per_group of its experts, in the order of their first appearance; then `group_count`: none
//   rows[t, j]      t per_token + the position of the group of e(t, j): the row of that pair where every token has per_token rows;
//                   tokens per_token, past the last row, for a pair that belongs to no expert
//
// Layouts       experts, rows: [tokens, slots];  groups: [tokens, per_token], per_token = min(slots, group_count).
// Grid          one invocation a token, folded into (x, y): slots^2 / 2 comparisons with what it wrote itself.

override WORKGROUP: u32 = 64u;

struct Params {
  tokens: u32,
  slots: u32,
  experts: u32,
  per_group: u32,
  group_count: u32,
  per_token: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> experts: array<u32>;
@group(0) @binding(2) var<storage, read_write> groups: array<u32>;
@group(0) @binding(3) var<storage, read_write> rows: array<u32>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (token >= params.tokens) { return; }
  let first_row = token * params.per_token;
  var found = 0u;
  for (var pair = token * params.slots; pair < (token + 1u) * params.slots; pair++) {
    let expert = experts[pair];
    if (expert >= params.experts) {
      rows[pair] = params.tokens * params.per_token;
      continue;
    }
    let group = expert / params.per_group;
    var position = 0u;
    while (position < found && groups[first_row + position] != group) { position++; }
    // distinct groups of so many slots: never more than per_token
    if (position == found && found < params.per_token) {
      groups[first_row + found] = group;
      found++;
    }
    rows[pair] = first_row + min(position, params.per_token - 1u);
  }
  for (var position = found; position < params.per_token; position++) { groups[first_row + position] = params.group_count; }
}
