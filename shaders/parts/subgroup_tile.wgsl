enable subgroups;

// A tile of 32 x 32 of a product, by a subgroup of eight: for software adapters, where a load from a buffer costs as much as a dozen
// multiply-adds of the whole subgroup, and a value of another lane next to nothing.
//
//   each lane loads a block of 4 rows x 4 of k of the left operand, and of 4 of k x 4 columns of the right one: 8 vec4 loads.
//   Lane l owns the columns 4 l .. 4 l + 4 of the tile; q0 .. q7 are its rows 0 .. 4, 4 .. 8 and so on, a column of the matrix being
//   a row of the tile. Every lane must take part: those outside the result are clamped to its edge, and not stored.
struct Tile {
  q0: mat4x4<f32>, q1: mat4x4<f32>, q2: mat4x4<f32>, q3: mat4x4<f32>,
  q4: mat4x4<f32>, q5: mat4x4<f32>, q6: mat4x4<f32>, q7: mat4x4<f32>,
}

// rows: column i is row i of the lane's block, along k;  columns: column i is row i of k, along the lane's columns.
fn multiply_add(t: ptr<function, Tile>, rows: mat4x4<f32>, columns: mat4x4<f32>) {
  (*t).q0 += columns * mat4x4(subgroupBroadcast(rows[0], 0u), subgroupBroadcast(rows[1], 0u), subgroupBroadcast(rows[2], 0u), subgroupBroadcast(rows[3], 0u));
  (*t).q1 += columns * mat4x4(subgroupBroadcast(rows[0], 1u), subgroupBroadcast(rows[1], 1u), subgroupBroadcast(rows[2], 1u), subgroupBroadcast(rows[3], 1u));
  (*t).q2 += columns * mat4x4(subgroupBroadcast(rows[0], 2u), subgroupBroadcast(rows[1], 2u), subgroupBroadcast(rows[2], 2u), subgroupBroadcast(rows[3], 2u));
  (*t).q3 += columns * mat4x4(subgroupBroadcast(rows[0], 3u), subgroupBroadcast(rows[1], 3u), subgroupBroadcast(rows[2], 3u), subgroupBroadcast(rows[3], 3u));
  (*t).q4 += columns * mat4x4(subgroupBroadcast(rows[0], 4u), subgroupBroadcast(rows[1], 4u), subgroupBroadcast(rows[2], 4u), subgroupBroadcast(rows[3], 4u));
  (*t).q5 += columns * mat4x4(subgroupBroadcast(rows[0], 5u), subgroupBroadcast(rows[1], 5u), subgroupBroadcast(rows[2], 5u), subgroupBroadcast(rows[3], 5u));
  (*t).q6 += columns * mat4x4(subgroupBroadcast(rows[0], 6u), subgroupBroadcast(rows[1], 6u), subgroupBroadcast(rows[2], 6u), subgroupBroadcast(rows[3], 6u));
  (*t).q7 += columns * mat4x4(subgroupBroadcast(rows[0], 7u), subgroupBroadcast(rows[1], 7u), subgroupBroadcast(rows[2], 7u), subgroupBroadcast(rows[3], 7u));
}
