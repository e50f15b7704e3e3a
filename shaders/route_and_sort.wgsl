// Routing (route.wgsl) and the stable sort of the (token, slot) pairs by expert (sort.wgsl) in one launch, for as many tokens and experts as
// suit one workgroup. Every result is what the two give.
//
// Layouts       logits: [tokens, experts];  bias: [experts] (BIASED);  chosen: [tokens, k] i32;  gates: [tokens, k];  norms: [tokens] of four;
//               order: [tokens k] pairs, token k + slot;  offsets: [experts + 1].
// Grid          one workgroup. Its invocations take the tokens in turn, then each a chunk of the pairs.

override WORKGROUP: u32 = 256u;

struct Params {
  tokens: u32,
  experts: u32,
  top_k: u32,
  scale: f32,
  inverse_scale: f32,
  count: u32,
  digits: u32,
  chunks: u32,
  share: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;
@group(0) @binding(4) var<storage, read_write> gates: array<f32>;
@group(0) @binding(5) var<storage, read_write> norms: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> order: array<u32>;
@group(0) @binding(7) var<storage, read_write> offsets: array<u32>;

fn position_at(place: u32) -> u32 { return place; }

fn digit_of(pair: u32) -> u32 { return chosen[pair]; }

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(local_invocation_index) local: u32) {
  for (var token = local; token < params.tokens; token += WORKGROUP) { route_token(token); }
  // A chunk's pairs are other invocations' choices.
  storageBarrier();
  sort_all(local);
}
