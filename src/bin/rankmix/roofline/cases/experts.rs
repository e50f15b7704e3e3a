//! Products with each pair's expert.

use rankmix::ops::{Activation, Layout, Projection, Routed};
use rankmix::{Graph, Value};

use super::{Case, EXPERTS, PAIRS, RANK, TOKENS, TOP_K, WIDTH, f, grouped, of_sorted};

pub(super) fn cases() -> Vec<Case> {
    let routing = [TOKENS, TOP_K, EXPERTS];
    let size = "1024 pairs, 8 experts, 1024 to 16";
    let back = "1024 pairs, 8 experts, 16 to 1024";
    let (a, b) = (f(&[EXPERTS, RANK, WIDTH]), f(&[EXPERTS, WIDTH, RANK]));
    let (x, z, gates) = (f(&[TOKENS, WIDTH]), f(&[PAIRS, RANK]), f(&[TOKENS, TOP_K]));
    let expand = |g: &mut Graph, v: &[Value], segments| {
        let routed = Routed {
            gates: v[2],
            segments,
        };
        Ok(vec![g.expand(
            v[0],
            v[1],
            Layout::OutIn,
            routed,
            2.0,
            None,
        )?])
    };
    // A feed-forward layer's.
    let routing_wide = [256, TOP_K, EXPERTS];
    let hidden = "512 pairs, 8 experts, 512 to 256";
    let up = f(&[EXPERTS, 256, 512]);
    let turns = f(&[EXPERTS, RANK / 2, WIDTH]);
    vec![
        grouped(
            "shrink",
            size,
            vec![x.clone(), a.clone()],
            routing,
            |g, v, segments| Ok(vec![g.shrink(v[0], v[1], Layout::OutIn, segments)?]),
        ),
        grouped(
            "expand",
            back,
            vec![z.clone(), b.clone(), gates.clone()],
            routing,
            expand,
        ),
        grouped(
            "segment_outer",
            size,
            vec![x.clone(), a.clone(), z.clone()],
            routing,
            |g, v, segments| {
                let z = g.shrink(v[0], v[1], Layout::OutIn, segments)?;
                g.gradients_from(&[(z, v[2])], &[v[1]])
            },
        ),
        grouped(
            "segment_outer gated",
            back,
            vec![z.clone(), b.clone(), gates.clone(), x.clone()],
            routing,
            move |g, v, segments| {
                let y = expand(g, v, segments)?[0];
                g.gradients_from(&[(y, v[3])], &[v[1]])
            },
        ),
        grouped(
            "gated_experts",
            hidden,
            vec![f(&[256, 512]), up.clone(), up],
            routing_wide,
            |g, v, segments| {
                let of = |weight| Projection { x: v[0], weight };
                let up = Some(of(v[2]));
                Ok(vec![g.gated_experts(
                    Activation::Silu,
                    of(v[1]),
                    up,
                    segments,
                    None,
                )?])
            },
        ),
        grouped(
            "expand wide",
            "512 pairs, 8 experts, 256 to 512",
            vec![f(&[512, 256]), f(&[EXPERTS, 512, 256]), f(&[256, TOP_K])],
            routing_wide,
            expand,
        ),
        grouped(
            "rotated_shrink",
            size,
            vec![x.clone(), a.clone(), turns.clone()],
            routing,
            |g, v, segments| Ok(g.rotated_shrink(v[0], v[1], v[2], segments)?.to_vec()),
        ),
        of_sorted(
            "rotated_shrink backward",
            size,
            vec![x.clone(), a.clone(), turns.clone(), z.clone()],
            routing,
            |g, v, segments| Ok(vec![g.rotated_shrink(v[0], v[1], v[2], segments)?[0]]),
            |g, v, before| g.gradients_from(&[(before.values[2], v[3])], &v[..3]),
        ),
        of_sorted(
            "expand backward",
            back,
            vec![z, b.clone(), gates.clone(), x.clone()],
            routing,
            expand,
            |g, v, before| g.gradients_from(&[(before.values[2], v[3])], &v[..3]),
        ),
        of_sorted(
            "rotated expand backward",
            "1024 pairs, 8 experts, 1024 to 16 to 1024",
            vec![x.clone(), b, gates, a, turns, x],
            routing,
            |g, v, segments| {
                let [u, _] = g.rotated_shrink(v[0], v[3], v[4], segments)?;
                let routed = Routed {
                    gates: v[2],
                    segments,
                };
                Ok(vec![g.expand(u, v[1], Layout::OutIn, routed, 2.0, None)?])
            },
            |g, v, before| g.gradients_from(&[(before.values[2], v[5])], &v[..5]),
        ),
    ]
}
