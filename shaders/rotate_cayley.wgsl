// The Cayley rotation in the rank space: Q is skew-symmetric, its upper triangle is the generator p, row by row.
//
//   forward     (I - Q) w = z         y = 2 w - z                                     (equals (I - Q)^-1 (I + Q) z)
//   backward    (I + Q) v = dy        dz = 2 v - dy        dp_ab = 2 (v_a w_b - v_b w_a), a < b, with w = (y + z) / 2
//
// The symmetric part of I - Q is I, so elimination needs no pivots: every pivot is at least 1. Where w = z, y is z itself, so that
// p = 0 gives z back bit for bit (2 z - z would lose the sign of a zero).
//
// Layouts       z, y, dy, dz: [rows, RANK] row-major;  p, dp: [rows, RANK (RANK - 1) / 2], pairs (a, b), a < b, row by row.
// Grid          one workgroup a row, folded into (x, y) because a dimension stops at 65,535 workgroups.
// Memory        the matrix in workgroup memory, RANK^2 words, exactly the 16,384 bytes that WebGPU promises at rank 64. There is
//               no word left for the right-hand side. But A[0][0] is 1, so the first step of the elimination is done while the
//               matrix is filled,
//                 A[i][j] = (i == j) - Q[i][j] + Q[0][i] Q[0][j]        rhs[i] = z[i] - Q[0][i] z[0]        (i, j >= 1)
//               after which nobody reads column 0, and the right-hand side is kept there.
//               A[i][j] is at j * RANK + i: column by column, so that neighbouring lanes, which have neighbouring rows, touch
//               neighbouring words, in the elimination and in the back substitution.
// Work          LANES invocations (a power of two, about RANK) take the rows, WORKGROUP / LANES groups of them the columns. Every
//               element is updated by one invocation in the order of the steps: two runs are equal bit for bit.

override WORKGROUP: u32 = 64u;
override LANES: u32 = 64u;
override RANK: u32 = 64u;

struct Params {
  rows: u32,
  groups_per_row: u32, // workgroups along x of the folded grid
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> generator: array<f32>;
@group(0) @binding(2) var<storage, read> right: array<f32>;             // forward: z, backward: dy
@group(0) @binding(3) var<storage, read> z: array<f32>;                 // backward only
@group(0) @binding(4) var<storage, read> y: array<f32>;                 // backward only
@group(0) @binding(5) var<storage, read_write> out_rows: array<f32>;    // forward: y, backward: dz
@group(0) @binding(6) var<storage, read_write> d_generator: array<f32>; // backward only

var<workgroup> matrix: array<f32, RANK * RANK>;

// Where the pair (a, b), a < b, is in the generator of a row.
fn pair_index(row: u32, a: u32, b: u32) -> u32 {
  return row * (RANK * (RANK - 1u) / 2u) + a * (2u * RANK - a - 1u) / 2u + b - a - 1u;
}

// I - sign * Q and the right-hand side, after the first step of the elimination.
fn fill(row: u32, local: u32, sign: f32) {
  let lane = local % LANES;
  let first = right[row * RANK];
  for (var a = local / LANES; a < RANK; a += WORKGROUP / LANES) {
    // Row 0 is left as it is: its factor is 0.
    var factor_a = 0.0;
    if (a > 0u) { factor_a = sign * generator[pair_index(row, 0u, a)]; }
    if (lane == 0u) {
      matrix[a] = right[row * RANK + a] - factor_a * first;
      if (a > 0u) { matrix[a * RANK + a] = 1.0 + factor_a * factor_a; }
    }
    for (var b = a + 1u + lane; b < RANK; b += LANES) {
      let q = sign * generator[pair_index(row, a, b)];
      let product = factor_a * sign * generator[pair_index(row, 0u, b)];
      matrix[b * RANK + a] = product - q;
      if (a > 0u) { matrix[a * RANK + b] = product + q; }
    }
  }
}

// Solves (I - sign * Q) x = right for a row; x is left in column 0, where the invocations that share it find it after a barrier.
fn solve(row: u32, local: u32, sign: f32) {
  let lane = local % LANES;
  fill(row, local, sign);
  for (var k = 1u; k < RANK; k++) {
    workgroupBarrier();
    for (var i = k + 1u + lane; i < RANK; i += LANES) {
      let factor = matrix[k * RANK + i] / matrix[k * RANK + k];
      // Column 0, the right-hand side, then those right of k. Column k is not cleared: nobody reads it below its diagonal again.
      for (var column = local / LANES; column < RANK - k; column += WORKGROUP / LANES) {
        let j = select(k + column, 0u, column == 0u);
        matrix[j * RANK + i] -= factor * matrix[j * RANK + k];
      }
    }
  }
  for (var k = RANK - 1u; k > 0u; k--) {
    workgroupBarrier();
    let x = matrix[k] / matrix[k * RANK + k];
    for (var first = 0u; first < k; first += WORKGROUP) {
      let i = first + local;
      if (i < k) { matrix[i] -= matrix[k * RANK + i] * x; }
    }
  }
  workgroupBarrier();
  // Only now are the unknowns themselves written: in the steps above every invocation divides for itself, and would else meet one
  // that is overwritten. Row 0 has a pivot of 1.
  for (var i = local; i < RANK; i += WORKGROUP) {
    if (i > 0u) { matrix[i] /= matrix[i * RANK + i]; }
  }
}

// 2 solution - right-hand side.
fn reflected(solution: f32, right_hand: f32) -> f32 {
  return select(2.0 * solution - right_hand, right_hand, solution == right_hand);
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  solve(row, local, 1.0);
  // Each invocation reads what it has itself written last.
  for (var i = local; i < RANK; i += WORKGROUP) {
    out_rows[row * RANK + i] = reflected(matrix[i], right[row * RANK + i]);
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = workgroup.y * params.groups_per_row + workgroup.x;
  if (row >= params.rows) { return; }
  solve(row, local, -1.0);
  // The matrix is done with (what is read of row i at the end of solve is read by the invocation that overwrites it here): w
  // takes the place of column 1.
  for (var i = local; i < RANK; i += WORKGROUP) {
    let at = row * RANK + i;
    out_rows[at] = reflected(matrix[i], right[at]);
    matrix[RANK + i] = 0.5 * (y[at] + z[at]);
  }
  workgroupBarrier();
  for (var a = local / LANES; a < RANK; a += WORKGROUP / LANES) {
    for (var b = a + 1u + local % LANES; b < RANK; b += LANES) {
      d_generator[pair_index(row, a, b)] = 2.0 * (matrix[a] * matrix[RANK + b] - matrix[b] * matrix[RANK + a]);
    }
  }
}
