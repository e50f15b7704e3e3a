// The stable sort of neighbouring places by digit within one workgroup, without atomics. The module declares `override WORKGROUP`,
// `params.count`, `params.digits`, `params.chunks`, `params.share`, the buffers `order` and `offsets`, `position_at(place)` and
// `digit_of(position)`.
//
// An invocation has a chunk of `share` places, in their order; only the first `chunks` invocations have one.
//   cells     [rows, chunks + 1]: row r counts digit 2r in the lower 16 bits and digit 2r + 1 in the upper, column c the places of chunk c;
//             scan_rows makes of each row its exclusive prefix sum, whose last column is the row's total.
//             Behind them [digits]: where the places of each digit go.
// Two counts share a word because then all of a chunk's counters are its invocation's alone. They never carry: a digit has fewer than
// 2^16 places in a block.

override CELLS: u32 = 4096u; // 16 KiB

var<workgroup> cells: array<u32, CELLS>;

fn rows() -> u32 { return (params.digits + 1u) / 2u; }

fn columns() -> u32 { return params.chunks + 1u; }

fn start_cell(digit: u32) -> u32 { return rows() * columns() + digit; }

fn half_shift(digit: u32) -> u32 { return digit % 2u * 16u; }

// From where to where the invocation's chunk goes, in a block that starts at `first`.
fn chunk_places(local: u32, first: u32) -> vec2<u32> {
  let start = min(first + min(local, params.chunks) * params.share, params.count);
  let end = min(start + params.share, params.count);
  return vec2(start, select(start, end, local < params.chunks));
}

fn count_chunk(local: u32, places: vec2<u32>) {
  if (local >= params.chunks) { return; }
  for (var row = 0u; row < rows(); row++) { cells[row * columns() + local] = 0u; }
  for (var place = places.x; place < places.y; place++) {
    let digit = digit_of(position_at(place));
    cells[digit / 2u * columns() + local] += 1u << half_shift(digit);
  }
}

fn scan_rows(local: u32) {
  for (var row = local; row < rows(); row += WORKGROUP) {
    let first = row * columns();
    var sum = 0u;
    for (var cell = first; cell < first + params.chunks; cell++) {
      let here = cells[cell];
      cells[cell] = sum;
      sum += here;
    }
    cells[first + params.chunks] = sum;
  }
}

fn row_total(row: u32) -> u32 { return cells[row * columns() + params.chunks]; }

// How many places of the block have a smaller digit.
fn places_before(digit: u32) -> u32 {
  var sum = 0u;
  for (var row = 0u; row < digit / 2u; row++) { sum += (row_total(row) & 0xffffu) + (row_total(row) >> 16u); }
  if (digit % 2u == 1u) { sum += row_total(digit / 2u) & 0xffffu; }
  return sum;
}

fn scatter_chunk(local: u32, places: vec2<u32>) {
  for (var place = places.x; place < places.y; place++) {
    let position = position_at(place);
    let digit = digit_of(position);
    let cell = digit / 2u * columns() + local;
    let before = cells[cell];
    cells[cell] = before + (1u << half_shift(digit));
    order[cells[start_cell(digit)] + ((before >> half_shift(digit)) & 0xffffu)] = position;
  }
}

// All places are one block, and its digits are the keys. To be called by every invocation of the only workgroup.
fn sort_all(local: u32) {
  let places = chunk_places(local, 0u);
  count_chunk(local, places);
  workgroupBarrier();
  scan_rows(local);
  workgroupBarrier();
  for (var digit = local; digit < params.digits; digit += WORKGROUP) {
    let start = places_before(digit);
    cells[start_cell(digit)] = start;
    offsets[digit] = start;
  }
  if (local == 0u) { offsets[params.digits] = params.count; }
  workgroupBarrier();
  scatter_chunk(local, places);
}
