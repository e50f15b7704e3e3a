// Cross-entropy of class labels, the mean over the rows that have one (label -100: none):
//
//   row         lse[t] = logsumexp(logits[t]),   loss_of_row[t] = lse[t] - logits[t, label[t]], or 0 without a label
//   total       valid = how many rows have a label,   loss = sum_t loss_of_row[t] / valid, or 0 if valid = 0
//   backward    dlogits[t, c] = dloss (exp(logits[t, c] - lse[t]) - [c = label[t]]) / valid, or 0 without a label
//
// Layouts       logits, dlogits: [rows, classes] row-major;  labels, lse, loss_of_row: [rows];  the others one number.
// Grid          row: one workgroup a row, a tree in workgroup memory. total: one workgroup, which reads 8 bytes a row.
//               backward: one invocation an element. Folded into (x, y): a dimension stops at 65,535 workgroups.
// Bounds        a label from outside is checked when it is written; one that a kernel computed is clamped to 0..classes.
// Cost          row reads every logit once, backward reads and writes each once: memory-bound. The probabilities are never
//               stored.

override WORKGROUP: u32 = 64u;

const IGNORED = -100;

struct Params {
  rows: u32,
  classes: u32,
  groups_per_row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<i32>;
@group(0) @binding(3) var<storage, read_write> lse_result: array<f32>;      // row only
@group(0) @binding(4) var<storage, read_write> loss_of_row: array<f32>;     // row: written, total: read
@group(0) @binding(5) var<storage, read_write> loss: array<f32>;            // total only
@group(0) @binding(6) var<storage, read_write> valid_result: array<f32>;    // total only
@group(0) @binding(7) var<storage, read> lse: array<f32>;                   // backward only
@group(0) @binding(8) var<storage, read> valid: array<f32>;                 // backward only
@group(0) @binding(9) var<storage, read> dloss: array<f32>;                 // backward only
@group(0) @binding(10) var<storage, read_write> dlogits: array<f32>;        // backward only

fn class_of(label: i32) -> u32 {
  return u32(clamp(label, 0, i32(params.classes) - 1));
}

@compute @workgroup_size(WORKGROUP)
fn row(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let t = workgroup.y * params.groups_per_row + workgroup.x;
  if (t >= params.rows) { return; }
  let m_s = row_soft_max(t * params.classes, params.classes, local);
  if (local == 0u) {
    let log_s = log(m_s.y);
    lse_result[t] = m_s.x + log_s;
    let label = labels[t];
    // The difference to the maximum first: a small loss is not rounded as the large logits are.
    let row_loss = (m_s.x - logits[t * params.classes + class_of(label)]) + log_s;
    loss_of_row[t] = select(row_loss, 0.0, label == IGNORED);
  }
}

@compute @workgroup_size(WORKGROUP)
fn total(@builtin(local_invocation_index) local: u32) {
  var sum = 0.0;
  var count = 0.0;
  for (var t = local; t < params.rows; t += WORKGROUP) {
    sum += loss_of_row[t];
    count += select(1.0, 0.0, labels[t] == IGNORED);
  }
  let all = workgroup_sum(sum, local);
  let counted = workgroup_sum(count, local);
  if (local == 0u) {
    loss[0] = all / max(counted, 1.0);
    valid_result[0] = counted;
  }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let q = (workgroup.y * params.groups_per_row + workgroup.x) * WORKGROUP + local;
  if (q >= params.rows * params.classes) { return; }
  let t = q / params.classes;
  let label = labels[t];
  let hit = select(0.0, 1.0, q - t * params.classes == class_of(label));
  let gradient = dloss[0] / max(valid[0], 1.0) * (exp(logits[q] - lse[t]) - hit);
  dlogits[q] = select(gradient, 0.0, label == IGNORED);
}
