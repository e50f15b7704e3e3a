// Blocks of 4 x 4 of the operands a and b of a product, for shaders that declare both as arrays of vec4s. A stored matrix has `rows` rows of
// `length` elements from `base` on; a block is four neighbours in a row of four rows, zeros outside the matrix.
override TRANSPOSE_A: bool = false;
override TRANSPOSE_B: bool = false;
override ALIGNED_A: bool = true; // every stored row starts at a multiple of 4: four neighbours are one load, and all inside or all outside
override ALIGNED_B: bool = true;
override EDGES: bool = true;     // whether anything is outside at all

fn a_element(at: u32, inside: bool) -> f32 {
  let index = select(0u, at, inside);
  return select(0.0, a[index >> 2u][index & 3u], inside);
}

fn b_element(at: u32, inside: bool) -> f32 {
  let index = select(0u, at, inside);
  return select(0.0, b[index >> 2u][index & 3u], inside);
}

// Four neighbours in a row of which `left` are inside.
fn a_four(at: u32, left: u32) -> vec4<f32> {
  var four = vec4(0.0);
  if (!EDGES) {
    four = a[at >> 2u];
  } else if (ALIGNED_A) {
    let inside = left > 0u;
    four = select(four, a[select(0u, at >> 2u, inside)], inside);
  } else {
    four = vec4(a_element(at, left > 0u), a_element(at + 1u, left > 1u), a_element(at + 2u, left > 2u), a_element(at + 3u, left > 3u));
  }
  return four;
}

fn b_four(at: u32, left: u32) -> vec4<f32> {
  var four = vec4(0.0);
  if (!EDGES) {
    four = b[at >> 2u];
  } else if (ALIGNED_B) {
    let inside = left > 0u;
    four = select(four, b[select(0u, at >> 2u, inside)], inside);
  } else {
    four = vec4(b_element(at, left > 0u), b_element(at + 1u, left > 1u), b_element(at + 2u, left > 2u), b_element(at + 3u, left > 3u));
  }
  return four;
}

// How many elements of a row are left from a column on; none of a row that is not there.
fn left_of(row: u32, column: u32, rows: u32, length: u32) -> u32 {
  return select(0u, length - min(column, length), row < rows);
}

fn a_block(base: u32, row: u32, column: u32, rows: u32, length: u32) -> mat4x4<f32> {
  let at = base + row * length + column;
  return mat4x4(
    a_four(at, left_of(row, column, rows, length)),
    a_four(at + length, left_of(row + 1u, column, rows, length)),
    a_four(at + 2u * length, left_of(row + 2u, column, rows, length)),
    a_four(at + 3u * length, left_of(row + 3u, column, rows, length)));
}

fn b_block(base: u32, row: u32, column: u32, rows: u32, length: u32) -> mat4x4<f32> {
  let at = base + row * length + column;
  return mat4x4(
    b_four(at, left_of(row, column, rows, length)),
    b_four(at + length, left_of(row + 1u, column, rows, length)),
    b_four(at + 2u * length, left_of(row + 2u, column, rows, length)),
    b_four(at + 3u * length, left_of(row + 3u, column, rows, length)));
}

// op(b) from (k, column) on: four of k, each along the columns.
fn b_columns(base: u32, k: u32, column: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
  if (TRANSPOSE_B) {
    block = transpose(b_block(base, column, k, params.n, params.k));
  } else {
    block = b_block(base, k, column, params.k, params.n);
  }
  return block;
}
