// A type whose name naga's HLSL also gives to a function of its own, the one that makes a Pair: the other languages have no such function, and in HLSL the
// type cannot be named any more. Type errors that only HLSL has.
// fault at the entry point: dxc
// launch: forward, read 1, write 2

struct Pair {
  first: f32,
  second: f32,
}

struct ConstructPair {
  pair: Pair,
}

@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;

fn built(x: f32) -> ConstructPair {
  return ConstructPair(Pair(x, 2.0 * x));
}

@compute @workgroup_size(64)
fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
  let built_here = built(source[id.x]);
  result[id.x] = built_here.pair.first + built_here.pair.second;
}
