// A tile of registers, 16 x 16 an invocation, that no GPU has room for.
// fault at the entry point: amd
// launch: forward, read 1, read 2, write 3, params 2

struct Params { k: u32, n: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;

@compute @workgroup_size(8, 8)
fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
  var tile: array<f32, 256>;
  var left: array<f32, 16>;
  for (var k = 0u; k < params.k; k++) {
    for (var i = 0u; i < 16u; i++) { left[i] = a[(id.y * 16u + i) * params.k + k]; }
    for (var j = 0u; j < 16u; j++) {
      let right = b[k * params.n + id.x * 16u + j];
      for (var i = 0u; i < 16u; i++) { tile[i * 16u + j] += left[i] * right; }
    }
  }
  for (var i = 0u; i < 16u; i++) {
    for (var j = 0u; j < 16u; j++) { c[(id.y * 16u + i) * params.n + id.x * 16u + j] = tile[i * 16u + j]; }
  }
}
