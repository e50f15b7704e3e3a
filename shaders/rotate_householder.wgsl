// A pair of Householder reflections in the rank space: H(w) = I - 2 w w^T / w.w, R = H(u + v) H(u), u = (1, ..., 1) / sqrt(rank) + a.
//
//   forward     t = H(u) z      y = H(w) t, w = u + v
//   backward    t = H(w) y, dt = H(w) dy: a reflection undoes itself.      dz = H(u) dt
//               dw = 2 / w.w ((w.y) dy - (w.dy) y)      du = 2 / u.u ((u.t) dt - (u.dt) t)      da = du + dw      dv = dw
//
// Where v is 0 the reflections undo each other, and z is copied, bit for bit. A direction whose square is not above 1e-30 has no
// reflection: H is then the identity.
//
// Layouts       z, y, dy, dz: [rows, rank] row-major;  generator and its gradient: [rows, 2 rank], in a row a, then v.
// Grid          LANES invocations (a power of two, about the rank, at most WORKGROUP) take a row, WORKGROUP / LANES rows a workgroup; folded
//               into (x, y) because a dimension stops at 65,535 workgroups.
// Work          two sums over the lanes, of up to four numbers at once, in a tree whose shape depends on LANES alone: two runs are equal
//               bit for bit. t is computed again where it is needed rather than kept: it takes two operations.

override WORKGROUP: u32 = 64u;
override LANES: u32 = 16u;

struct Params {
  rows: u32,
  rank: u32,
  start: f32,          // 1 / sqrt(rank)
  groups_per_row: u32, // workgroups along x of the folded grid
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> generator: array<f32>;
@group(0) @binding(2) var<storage, read> z_or_y: array<f32>;            // forward: z, backward: y
@group(0) @binding(3) var<storage, read> dy: array<f32>;                // backward only
@group(0) @binding(4) var<storage, read_write> out_rows: array<f32>;    // forward: y, backward: dz
@group(0) @binding(5) var<storage, read_write> d_generator: array<f32>; // backward only

const TINY: f32 = 1e-30;

var<workgroup> sums: array<vec4<f32>, WORKGROUP>;

// The sum over the lanes of a row. To be called by every invocation of the workgroup.
fn sum_over_lanes(value: vec4<f32>, local: u32) -> vec4<f32> {
  workgroupBarrier(); // an earlier sum may not have been read by all yet
  sums[local] = value;
  for (var half = LANES / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (local % LANES < half) { sums[local] += sums[local + half]; }
  }
  workgroupBarrier();
  return sums[local - local % LANES];
}

// 2 / w.w
fn factor(square: f32) -> f32 {
  return select(0.0, 2.0 / square, square > TINY);
}

fn row_of(workgroup: vec3<u32>, local: u32) -> u32 {
  return (workgroup.y * params.groups_per_row + workgroup.x) * (WORKGROUP / LANES) + local / LANES;
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % LANES;
  let row = row_of(workgroup, local);
  // A lane past the last row or the last coordinate adds zeros.
  let end = select(0u, params.rank, row < params.rows);
  let at = row * params.rank;
  let a_at = 2u * at;
  let v_at = a_at + params.rank;

  var first = vec4(0.0); // u.u, u.z, w.w, how many coordinates of v are not 0
  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let v = generator[v_at + c];
    let w = u + v;
    first += vec4(u * u, u * z_or_y[at + c], w * w, select(0.0, 1.0, v != 0.0));
  }
  first = sum_over_lanes(first, local);
  let along_u = factor(first.x) * first.y;

  var second = 0.0; // w.t
  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let t = z_or_y[at + c] - along_u * u;
    second += (u + generator[v_at + c]) * t;
  }
  second = sum_over_lanes(vec4(second, 0.0, 0.0, 0.0), local).x;
  let along_w = factor(first.z) * second;

  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let z = z_or_y[at + c];
    let y = (z - along_u * u) - along_w * (u + generator[v_at + c]);
    out_rows[at + c] = select(y, z, first.w == 0.0);
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % LANES;
  let row = row_of(workgroup, local);
  // A lane past the last row or the last coordinate adds zeros.
  let end = select(0u, params.rank, row < params.rows);
  let at = row * params.rank;
  let a_at = 2u * at;
  let v_at = a_at + params.rank;

  var first = vec4(0.0); // u.u, w.w, w.y, w.dy
  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let w = u + generator[v_at + c];
    first += vec4(u * u, w * w, w * z_or_y[at + c], w * dy[at + c]);
  }
  first = sum_over_lanes(first, local);
  let along_w = factor(first.y) * first.zw; // of y and of dy

  var second = vec4(0.0); // u.t, u.dt, how many coordinates of v are not 0
  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let v = generator[v_at + c];
    let t = vec2(z_or_y[at + c], dy[at + c]) - along_w * (u + v);
    second += vec4(u * t, select(0.0, 1.0, v != 0.0), 0.0);
  }
  second = sum_over_lanes(second, local);
  let along_u = factor(first.x) * second.xy; // of t and of dt

  for (var c = lane; c < end; c += LANES) {
    let u = params.start + generator[a_at + c];
    let w = u + generator[v_at + c];
    let y = vec2(z_or_y[at + c], dy[at + c]);
    let t = y - along_w * w;
    out_rows[at + c] = select(t.y - along_u.y * u, y.y, second.z == 0.0);
    let d_w = along_w.x * y.y - along_w.y * y.x;
    let d_u = along_u.x * t.y - along_u.y * t.x;
    d_generator[a_at + c] = d_u + d_w;
    d_generator[v_at + c] = d_w;
  }
}
