// Mixtures of core matrices by one invocation, which has 4 elements of a row, by the formulas in mix_cores.wgsl. The module declares
// `override ALIGNED`, `params.tokens`, `params.slots`, `params.experts`, `params.rank`, the buffers `z`, `core`, `du` (vec4s) and
// `out_rows`, and
//
//   expert_of(token, slot)              the expert of a slot; under a dense gate, where four tokens share the matrices, it is the slot
//   gate_of(place, slot)                the gate of a slot of the token at this place
//   four_gates(place, t0, next, slot)   those of the four tokens t0 and next

fn z_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = z[index >> 2u][index & 3u]; }
  return value;
}

fn du_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = du[index >> 2u][index & 3u]; }
  return value;
}

fn core_element(index: u32, inside: bool) -> f32 {
  var value = 0.0;
  if (inside) { value = core[index >> 2u][index & 3u]; }
  return value;
}

// 4 elements of a row, 0 past its end.
fn z_block(token: u32, i: u32) -> vec4<f32> {
  let at = token * params.rank + i;
  if (ALIGNED) {
    var block = vec4(0.0);
    if (i < params.rank) { block = z[at >> 2u]; }
    return block;
  }
  let r = params.rank;
  return vec4(z_element(at, i < r), z_element(at + 1u, i + 1u < r), z_element(at + 2u, i + 2u < r), z_element(at + 3u, i + 3u < r));
}

fn du_block(token: u32, j: u32) -> vec4<f32> {
  let at = token * params.rank + j;
  if (ALIGNED) { return du[at >> 2u]; }
  let r = params.rank;
  return vec4(du_element(at, j < r), du_element(at + 1u, j + 1u < r), du_element(at + 2u, j + 2u < r), du_element(at + 3u, j + 3u < r));
}

// 4 elements of a row of an expert's matrix, 0 past its end; a row past the last is the last.
fn core_block(expert: u32, row: u32, j: u32) -> vec4<f32> {
  let r = params.rank;
  let at = (expert * r + min(row, r - 1u)) * r + j;
  if (ALIGNED) { return core[at >> 2u]; }
  return vec4(core_element(at, j < r), core_element(at + 1u, j + 1u < r), core_element(at + 2u, j + 2u < r),
    core_element(at + 3u, j + 3u < r));
}

fn store(token: u32, j: u32, v: vec4<f32>) {
  if (j < params.rank) {
    let at = token * params.rank + j;
    let rest = params.rank - j;
    out_rows[at] = v.x;
    if (rest > 1u) { out_rows[at + 1u] = v.y; }
    if (rest > 2u) { out_rows[at + 2u] = v.z; }
    if (rest > 3u) { out_rows[at + 3u] = v.w; }
  }
}

// The other tokens of a group of 4; past the last it is the last one again, which is computed and not stored.
fn next_tokens(first: u32) -> vec3<u32> {
  return min(vec3(first + 1u, first + 2u, first + 3u), vec3(params.tokens - 1u));
}

fn store_four(first: u32, j: u32, v: mat4x4<f32>) {
  store(first, j, v[0]);
  if (first + 1u < params.tokens) { store(first + 1u, j, v[1]); }
  if (first + 2u < params.tokens) { store(first + 2u, j, v[2]); }
  if (first + 3u < params.tokens) { store(first + 3u, j, v[3]); }
}

fn applied(token: u32, place: u32, j: u32) -> vec4<f32> {
  var u = vec4(0.0);
  for (var slot = 0u; slot < params.slots; slot++) {
    let expert = expert_of(token, slot);
    if (expert >= params.experts) { continue; }
    var part = vec4(0.0);
    for (var i = 0u; i < params.rank; i += 4u) {
      // rows past the last meet zeros of z
      let x = z_block(token, i);
      part += x.x * core_block(expert, i, j) + x.y * core_block(expert, i + 1u, j)
        + x.z * core_block(expert, i + 2u, j) + x.w * core_block(expert, i + 3u, j);
    }
    u += gate_of(place, slot) * part;
  }
  return u;
}

fn merged(token: u32, place: u32, j: u32) -> vec4<f32> {
  var u = vec4(0.0);
  for (var i = 0u; i < params.rank; i += 4u) {
    var c0 = vec4(0.0);
    var c1 = vec4(0.0);
    var c2 = vec4(0.0);
    var c3 = vec4(0.0);
    for (var slot = 0u; slot < params.slots; slot++) {
      let expert = expert_of(token, slot);
      if (expert >= params.experts) { continue; }
      let gate = gate_of(place, slot);
      c0 += gate * core_block(expert, i, j);
      c1 += gate * core_block(expert, i + 1u, j);
      c2 += gate * core_block(expert, i + 2u, j);
      c3 += gate * core_block(expert, i + 3u, j);
    }
    let x = z_block(token, i);
    u += x.x * c0 + x.y * c1 + x.z * c2 + x.w * c3;
  }
  return u;
}

// A row a token.
fn applied_four(t0: u32, next: vec3<u32>, place: u32, j: u32) -> mat4x4<f32> {
  var u0 = vec4(0.0);
  var u1 = vec4(0.0);
  var u2 = vec4(0.0);
  var u3 = vec4(0.0);
  for (var expert = 0u; expert < params.slots; expert++) {
    var p0 = vec4(0.0);
    var p1 = vec4(0.0);
    var p2 = vec4(0.0);
    var p3 = vec4(0.0);
    for (var i = 0u; i < params.rank; i += 4u) {
      let m0 = core_block(expert, i, j);
      let m1 = core_block(expert, i + 1u, j);
      let m2 = core_block(expert, i + 2u, j);
      let m3 = core_block(expert, i + 3u, j);
      let x0 = z_block(t0, i);
      let x1 = z_block(next.x, i);
      let x2 = z_block(next.y, i);
      let x3 = z_block(next.z, i);
      p0 += x0.x * m0 + x0.y * m1 + x0.z * m2 + x0.w * m3;
      p1 += x1.x * m0 + x1.y * m1 + x1.z * m2 + x1.w * m3;
      p2 += x2.x * m0 + x2.y * m1 + x2.z * m2 + x2.w * m3;
      p3 += x3.x * m0 + x3.y * m1 + x3.z * m2 + x3.w * m3;
    }
    let gate = four_gates(place, t0, next, expert);
    u0 += gate.x * p0;
    u1 += gate.y * p1;
    u2 += gate.z * p2;
    u3 += gate.w * p3;
  }
  return mat4x4(u0, u1, u2, u3);
}

// Two rows of C at a time: 8 accumulators.
fn merged_four(t0: u32, next: vec3<u32>, place: u32, j: u32) -> mat4x4<f32> {
  var u0 = vec4(0.0);
  var u1 = vec4(0.0);
  var u2 = vec4(0.0);
  var u3 = vec4(0.0);
  for (var i = 0u; i < params.rank; i += 2u) {
    var c0 = vec4(0.0);
    var c1 = vec4(0.0);
    var c2 = vec4(0.0);
    var c3 = vec4(0.0);
    var d0 = vec4(0.0);
    var d1 = vec4(0.0);
    var d2 = vec4(0.0);
    var d3 = vec4(0.0);
    for (var expert = 0u; expert < params.slots; expert++) {
      let m = core_block(expert, i, j);
      let n = core_block(expert, i + 1u, j);
      let gate = four_gates(place, t0, next, expert);
      c0 += gate.x * m;
      c1 += gate.y * m;
      c2 += gate.z * m;
      c3 += gate.w * m;
      d0 += gate.x * n;
      d1 += gate.y * n;
      d2 += gate.z * n;
      d3 += gate.w * n;
    }
    let inside = i + 1u < params.rank;
    let r = params.rank;
    u0 += z_element(t0 * r + i, true) * c0 + z_element(t0 * r + i + 1u, inside) * d0;
    u1 += z_element(next.x * r + i, true) * c1 + z_element(next.x * r + i + 1u, inside) * d1;
    u2 += z_element(next.y * r + i, true) * c2 + z_element(next.y * r + i + 1u, inside) * d2;
    u3 += z_element(next.z * r + i, true) * c3 + z_element(next.z * r + i + 1u, inside) * d3;
  }
  return mat4x4(u0, u1, u2, u3);
}

// 4 rows of M[expert] du.
fn rows_times_du(expert: u32, i: u32, token: u32) -> vec4<f32> {
  var w = vec4(0.0);
  for (var j = 0u; j < params.rank; j += 4u) {
    let d = du_block(token, j);
    w += vec4(dot(core_block(expert, i, j), d), dot(core_block(expert, i + 1u, j), d),
      dot(core_block(expert, i + 2u, j), d), dot(core_block(expert, i + 3u, j), d));
  }
  return w;
}

// The same for four tokens.
fn rows_times_four_du(expert: u32, i: u32, t0: u32, next: vec3<u32>) -> mat4x4<f32> {
  var w0 = vec4(0.0);
  var w1 = vec4(0.0);
  var w2 = vec4(0.0);
  var w3 = vec4(0.0);
  for (var j = 0u; j < params.rank; j += 4u) {
    let m0 = core_block(expert, i, j);
    let m1 = core_block(expert, i + 1u, j);
    let m2 = core_block(expert, i + 2u, j);
    let m3 = core_block(expert, i + 3u, j);
    let d0 = du_block(t0, j);
    let d1 = du_block(next.x, j);
    let d2 = du_block(next.y, j);
    let d3 = du_block(next.z, j);
    w0 += vec4(dot(m0, d0), dot(m1, d0), dot(m2, d0), dot(m3, d0));
    w1 += vec4(dot(m0, d1), dot(m1, d1), dot(m2, d1), dot(m3, d1));
    w2 += vec4(dot(m0, d2), dot(m1, d2), dot(m2, d2), dot(m3, d2));
    w3 += vec4(dot(m0, d3), dot(m1, d3), dot(m2, d3), dot(m3, d3));
  }
  return mat4x4(w0, w1, w2, w3);
}
