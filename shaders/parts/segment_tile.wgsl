// Which part of which expert's segment a workgroup works on. The module declares `params.segments` and `segment_start(expert)`: where the
// segment of an expert starts in the sorted order, or, for the number of segments, where the last one ends.

struct SegmentTile {
  expert: u32,
  first: u32, // the tile's first place in the sorted order
  end: u32,   // the end of the segment
  found: bool,
}

// The launch has an upper bound of tiles: each finds its own by walking over the segments, so that nothing is read back.
fn find_tile(tile: u32, pairs_per_tile: u32) -> SegmentTile {
  var before = 0u;
  for (var expert = 0u; expert < params.segments; expert++) {
    let start = segment_start(expert);
    let end = segment_start(expert + 1u);
    let tiles = (end - start + pairs_per_tile - 1u) / pairs_per_tile;
    if (tile < before + tiles) { return SegmentTile(expert, start + (tile - before) * pairs_per_tile, end, true); }
    before += tiles;
  }
  return SegmentTile(0u, 0u, 0u, false);
}

