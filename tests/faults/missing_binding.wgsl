// A buffer that the entry point uses and the launch does not bind.
// launch: forward, read 1, write 2

@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;
@group(0) @binding(3) var<storage, read> forgotten: array<f32>; // fault: naga

@compute @workgroup_size(64)
fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
  result[id.x] = source[id.x] + forgotten[id.x];
}
