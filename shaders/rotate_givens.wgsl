// A chain of plane rotations in the rank space: one angle for every pair of coordinates (a, b), a < b, applied one after another
// in the order (0,1), (0,2) ... (0,r-1), (1,2) ... (r-2,r-1).
//
//   forward     y_a, y_b = cos p * y_a - sin p * y_b, sin p * y_a + cos p * y_b          (y starts as z)
//   backward    from the end of the chain to its start, beginning with the output y and u = dy:
//               dp = u_b * y_a - u_a * y_b, then the rotation is undone on y and on u; what is left of u is dz
//
// The chain is sequential, so rows are what runs in parallel: one invocation a row. Backward keeps no state from forward: undoing a
// rotation gives back what it was applied to. An angle of 0 is passed over, which gives z back bit for bit.
//
// Layouts       z, y, dy, dz: [rows, RANK] row-major;  p, dp: [rows, RANK (RANK - 1) / 2], pairs in the order of the chain.
// Grid          one invocation a row, folded into (x, y) because a dimension stops at 65,535 workgroups.
// Memory        an array of RANK floats that is indexed in a loop would spill out of registers: the rows of a workgroup are in
//               workgroup memory, coordinate by coordinate, so that neighbouring invocations touch neighbouring words. None
//               touches another's: there are no barriers. WORKGROUP is chosen from RANK so that forward takes at most 4096
//               words, and backward, which has y and u there, as many. The coordinate a, in every pair of its run, stays in a
//               register.

override WORKGROUP: u32 = 32u;
override RANK: u32 = 64u;

struct Params {
  rows: u32,
  groups_per_row: u32, // workgroups along x of the folded grid
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> angles: array<f32>;
@group(0) @binding(2) var<storage, read> z_or_y: array<f32>;          // forward: z, backward: y
@group(0) @binding(3) var<storage, read> dy: array<f32>;              // backward only
@group(0) @binding(4) var<storage, read_write> out_rows: array<f32>;  // forward: y, backward: dz
@group(0) @binding(5) var<storage, read_write> d_angles: array<f32>;  // backward only

var<workgroup> y: array<f32, RANK * WORKGROUP>;
var<workgroup> u: array<f32, RANK * WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  for (var c = 0u; c < RANK; c++) {
    y[c * WORKGROUP + local] = z_or_y[row * RANK + c];
  }
  var q = row * (RANK * (RANK - 1u) / 2u);
  for (var a = 0u; a < RANK; a++) {
    var y_a = y[a * WORKGROUP + local];
    for (var b = a + 1u; b < RANK; b++) {
      let angle = angles[q];
      q++;
      if (angle != 0.0) {
        let r = cos_sin(angle);
        let y_b = y[b * WORKGROUP + local];
        y[b * WORKGROUP + local] = r.y * y_a + r.x * y_b;
        y_a = r.x * y_a - r.y * y_b;
      }
    }
    // No later rotation touches coordinate a.
    out_rows[row * RANK + a] = y_a;
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (row >= params.rows) { return; }
  for (var c = 0u; c < RANK; c++) {
    y[c * WORKGROUP + local] = z_or_y[row * RANK + c];
    u[c * WORKGROUP + local] = dy[row * RANK + c];
  }
  // One past the pair (a, b), counted down to the start of the row.
  var q = (row + 1u) * (RANK * (RANK - 1u) / 2u);
  for (var above = RANK; above > 0u; above--) {
    let a = above - 1u;
    var y_a = y[a * WORKGROUP + local];
    var u_a = u[a * WORKGROUP + local];
    for (var b = RANK - 1u; b > a; b--) {
      q--;
      let angle = angles[q];
      let y_b = y[b * WORKGROUP + local];
      let u_b = u[b * WORKGROUP + local];
      d_angles[q] = u_b * y_a - u_a * y_b;
      if (angle != 0.0) {
        let r = cos_sin(angle);
        y[b * WORKGROUP + local] = r.x * y_b - r.y * y_a;
        u[b * WORKGROUP + local] = r.x * u_b - r.y * u_a;
        y_a = r.x * y_a + r.y * y_b;
        u_a = r.x * u_a + r.y * u_b;
      }
    }
    y[a * WORKGROUP + local] = y_a;
    u[a * WORKGROUP + local] = u_a;
  }
  for (var c = 0u; c < RANK; c++) {
    out_rows[row * RANK + c] = u[c * WORKGROUP + local];
  }
}
