// More workgroup memory than WebGPU guarantees, and than DX12 has.
// launch: forward, write 1

@group(0) @binding(1) var<storage, read_write> result: array<f32>;

var<workgroup> too_large: array<vec4<f32>, 2100>; // fault: naga

@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) local: u32) {
  too_large[local] = vec4(f32(local));
  workgroupBarrier();
  result[local] = too_large[63u - local].x;
}
