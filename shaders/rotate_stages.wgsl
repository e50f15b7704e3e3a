// Plane rotations in stages in the rank space: the pairs of a stage have no coordinate in common and turn at the same time, the stages
// one after another.
//
//   butterfly   stage s: the pairs (i, i + 2^s) where bit s of i is 0 and i + 2^s < rank
//   brick wall  stage s: (0,1), (2,3) ... if s is even, (1,2), (3,4) ... if it is odd
//
//   forward     y_a, y_b = cos p * y_a - sin p * y_b, sin p * y_a + cos p * y_b          (y starts as z)
//   backward    from the last stage to the first, beginning with the output y and u = dy:
//               dp = u_b * y_a - u_a * y_b, then the rotation is undone on y and on u; what is left of u is dz
//
// No state is kept from forward. An angle of 0 is passed over, which gives z back bit for bit.
//
// Layouts       z, y, dy, dz: [rows, rank] row-major;  p, dp: [rows, numbers], stage by stage, in a stage by rising a.
// Grid          LANES invocations (a power of two, one a pair as far as WORKGROUP goes) take a row, WORKGROUP / LANES rows a workgroup;
//               folded into (x, y) because a dimension stops at 65,535 workgroups.
// Memory        rows in workgroup memory, row by row: up to a rank of 2 WORKGROUP the rows of a workgroup have at most as many coordinates
//               together, beyond it one row is alone. WORDS is the larger of 2 WORKGROUP and the rank, at most 2048: backward has y
//               and u there.

override WORKGROUP: u32 = 64u;
override LANES: u32 = 8u;
override WORDS: u32 = 128u;
override BRICK_WALL: bool = false;

struct Params {
  rows: u32,
  rank: u32,
  numbers: u32,
  stages: u32,
  groups_per_row: u32, // workgroups along x of the folded grid
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> angles: array<f32>;
@group(0) @binding(2) var<storage, read> z_or_y: array<f32>;          // forward: z, backward: y
@group(0) @binding(3) var<storage, read> dy: array<f32>;              // backward only
@group(0) @binding(4) var<storage, read_write> out_rows: array<f32>;  // forward: y, backward: dz
@group(0) @binding(5) var<storage, read_write> d_angles: array<f32>;  // backward only

var<workgroup> y: array<f32, WORDS>;
var<workgroup> u: array<f32, WORDS>;

struct Stage {
  first: u32, // the first coordinate of the first pair
  shift: u32, // partners are 2^shift apart
  pairs: u32,
}

fn stage_of(number: u32) -> Stage {
  if (BRICK_WALL) {
    let first = number % 2u;
    return Stage(first, 0u, (params.rank - first) / 2u);
  }
  // Blocks of 2 stride coordinates, the last of which may be cut off.
  let stride = 1u << number;
  let cut = params.rank % (2u * stride);
  return Stage(0u, number, params.rank / (2u * stride) * stride + max(cut, stride) - stride);
}

fn first_of_pair(stage: Stage, number: u32) -> u32 {
  return stage.first + number + ((number >> stage.shift) << stage.shift);
}

fn row_of(workgroup: vec3<u32>, local: u32) -> u32 {
  return (workgroup.y * params.groups_per_row + workgroup.x) * (WORKGROUP / LANES) + local / LANES;
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % LANES;
  let row = row_of(workgroup, local);
  let there = row < params.rows;
  let at = local / LANES * params.rank;
  if (there) {
    for (var c = lane; c < params.rank; c += LANES) { y[at + c] = z_or_y[row * params.rank + c]; }
  }
  var q = row * params.numbers;
  for (var s = 0u; s < params.stages; s++) {
    workgroupBarrier();
    let stage = stage_of(s);
    if (there) {
      for (var i = lane; i < stage.pairs; i += LANES) {
        let angle = angles[q + i];
        if (angle != 0.0) {
          let r = cos_sin(angle);
          let a = at + first_of_pair(stage, i);
          let b = a + (1u << stage.shift);
          let y_a = y[a];
          let y_b = y[b];
          y[a] = r.x * y_a - r.y * y_b;
          y[b] = r.y * y_a + r.x * y_b;
        }
      }
    }
    q += stage.pairs;
  }
  workgroupBarrier();
  if (there) {
    for (var c = lane; c < params.rank; c += LANES) { out_rows[row * params.rank + c] = y[at + c]; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % LANES;
  let row = row_of(workgroup, local);
  let there = row < params.rows;
  let at = local / LANES * params.rank;
  if (there) {
    for (var c = lane; c < params.rank; c += LANES) {
      y[at + c] = z_or_y[row * params.rank + c];
      u[at + c] = dy[row * params.rank + c];
    }
  }
  // One past the angles of the stage, counted down to the start of the row.
  var q = (row + 1u) * params.numbers;
  for (var above = params.stages; above > 0u; above--) {
    workgroupBarrier();
    let stage = stage_of(above - 1u);
    q -= stage.pairs;
    if (there) {
      for (var i = lane; i < stage.pairs; i += LANES) {
        let angle = angles[q + i];
        let a = at + first_of_pair(stage, i);
        let b = a + (1u << stage.shift);
        let y_a = y[a];
        let y_b = y[b];
        let u_a = u[a];
        let u_b = u[b];
        d_angles[q + i] = u_b * y_a - u_a * y_b;
        if (angle != 0.0) {
          let r = cos_sin(angle);
          y[a] = r.x * y_a + r.y * y_b;
          y[b] = r.x * y_b - r.y * y_a;
          u[a] = r.x * u_a + r.y * u_b;
          u[b] = r.x * u_b - r.y * u_a;
        }
      }
    }
  }
  workgroupBarrier();
  if (there) {
    for (var c = lane; c < params.rank; c += LANES) { out_rows[row * params.rank + c] = u[at + c]; }
  }
}
