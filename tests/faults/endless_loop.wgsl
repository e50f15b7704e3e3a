// A loop that never ends, because an unsigned number is never less than 0: valid for naga and Tint, which do not know what i is, and for DXC's
// front end; once the optimiser has dropped the condition, the validator refuses the DXIL.
// fault at the entry point: dxc
// launch: forward, read 1, write 2

@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) local: u32) {
  var x = source[local];
  for (var i = 63u; i >= 0u; i--) {
    x = 2.0 * x + 1.0;
    result[i & 63u] = x;
  }
}
