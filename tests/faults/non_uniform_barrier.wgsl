// A barrier that the invocations of a workgroup do not all reach: naga, DXC and every driver accept it.
// launch: forward, read 1, write 2, params 1

struct Params { elements: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;

var<workgroup> shared_values: array<f32, 64>;

@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) local: u32) {
  shared_values[local] = source[local];
  if (local < params.elements) {
    workgroupBarrier(); // fault: tint
  }
  result[local] = shared_values[63u - local];
}
