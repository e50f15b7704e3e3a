//! What stands between the products: rotations, the choice of experts, mixtures of cores, and what a router is judged by.

use rankmix::ops::{CoreMix, DropPolicy, Rotation, Routed, Segments};
use rankmix::{Graph, Result, TensorType, Value};

use super::{
    Before, Case, EXPERTS, PAIRS, RANK, TOKENS, TOP_K, backward, case, f, grouped, i, of_sorted,
};

/// A router of many experts: tokens, experts a token takes, experts.
const MANY: [usize; 3] = [4096, 8, 64];
/// More than one kernel routes and sorts.
const MORE_TOKENS: usize = 8192;

pub(super) fn rotations() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for rotation in Rotation::ALL {
        let z = f(&[PAIRS, RANK]);
        let operands = vec![z.clone(), f(&[PAIRS, rotation.numbers(RANK)?])];
        let rotate = move |g: &mut Graph, v: &[Value]| g.rotate(rotation, v[0], v[1]);
        let size = format!("{PAIRS}x{RANK}");
        let with_upstream = operands.iter().cloned().chain([z]).collect();
        let name = format!("rotate {rotation}");
        cases.push(case(name.clone(), size.clone(), operands, rotate));
        let name = format!("{name} backward");
        cases.push(backward(name, size, with_upstream, &[0, 1], rotate));
    }
    Ok(cases)
}

fn mixing() -> Vec<Case> {
    let (z, core, gates) = (
        f(&[TOKENS, RANK]),
        f(&[EXPERTS, RANK, RANK]),
        f(&[TOKENS, EXPERTS]),
    );
    let mix = |g: &mut Graph, v: &[Value]| g.mix_cores(v[0], v[1], v[2], CoreMix::Auto);
    let upstream = vec![z.clone(), core.clone(), gates.clone(), z.clone()];
    let merge = |g: &mut Graph, v: &[Value]| Ok(g.soft_merge(v[0], v[1], v[2], CoreMix::Auto)?[2]);
    let router = f(&[EXPERTS, RANK]);
    let merged = vec![z.clone(), core.clone(), router, z.clone()];
    vec![
        case("route", "512x8, top 2", vec![gates.clone()], |g, v| {
            Ok(g.route(v[0], TOP_K, true)?.gates)
        }),
        case(
            "sort",
            "1024 pairs, 8 experts",
            vec![(TensorType::i32([TOKENS, TOP_K]), EXPERTS)],
            |g, v| Ok(g.segments(v[0], EXPERTS)?.order()),
        ),
        case("softmax", "512x8", vec![gates.clone()], |g, v| {
            g.softmax(v[0])
        }),
        backward(
            "softmax backward",
            "512x8",
            vec![gates.clone(), gates.clone()],
            &[0],
            |g, v| g.softmax(v[0]),
        ),
        case("mix_cores", "512x16, 8 experts", vec![z, core, gates], mix),
        backward(
            "mix_cores backward",
            "512x16, 8 experts",
            upstream,
            &[0, 1, 2],
            mix,
        ),
        case(
            "soft_merge",
            "512x16, 8 experts",
            merged[..3].to_vec(),
            merge,
        ),
        backward(
            "soft_merge backward",
            "512x16, 8 experts",
            merged,
            &[0, 1, 2],
            merge,
        ),
    ]
}

fn routed(gates: Value, segments: Segments) -> Routed {
    Routed { gates, segments }
}

fn limited(g: &mut Graph, v: &[Value], segments: Segments) -> Result<Vec<Value>> {
    let [tokens, top_k, experts] = MANY;
    let capacity = tokens * top_k / experts;
    let limited = g.limit_capacity(routed(v[0], segments), experts, capacity, DropPolicy::Gate)?;
    Ok(vec![limited.gates])
}

/// A router's choices and its losses.
fn routers() -> Vec<Case> {
    let [tokens, top_k, experts] = MANY;
    let size = "4096x64, top 8";
    let pairs = "32768 pairs, 64 experts";
    let logits = || f(&[tokens, experts]);
    let gates = || f(&[tokens, top_k]);
    let choices = || i(&[tokens, top_k], experts);
    let balance = |g: &mut Graph, v: &[Value]| Ok(g.balance_loss(v[0], v[1])?.loss);
    let z_loss = |g: &mut Graph, v: &[Value]| g.z_loss(v[0]);
    let scalar = || f(&[]);
    vec![
        case("route and sort", size, vec![logits()], move |g, v| {
            Ok(g.route(v[0], top_k, true)?.gates)
        }),
        case(
            "route",
            "8192x64, top 8",
            vec![f(&[MORE_TOKENS, experts])],
            move |g, v| Ok(g.route(v[0], top_k, true)?.gates),
        ),
        backward(
            "route backward",
            size,
            vec![logits(), gates()],
            &[0],
            move |g, v| Ok(g.route(v[0], top_k, true)?.gates),
        ),
        grouped("limit_capacity", pairs, vec![gates()], MANY, limited),
        of_sorted(
            "limit_capacity backward",
            pairs,
            vec![gates(), gates()],
            MANY,
            limited,
            |g, v, before| g.gradients_from(&[(before.values[2], v[1])], &v[..1]),
        ),
        grouped(
            "active_groups",
            "32768 pairs, 64 experts, 16 groups",
            vec![],
            MANY,
            move |g, _, segments| {
                let groups = g.active_groups(segments, experts, 16)?;
                Ok(vec![groups.rows(), groups.segments.order()])
            },
        ),
        grouped(
            "router_metrics",
            size,
            vec![logits()],
            MANY,
            |g, v, segments| {
                let metrics = g.router_metrics(v[0], segments, None)?;
                Ok(vec![metrics.counts, metrics.entropy])
            },
        ),
        case("balance_loss", size, vec![logits(), choices()], balance),
        // The integers are the first operand's neighbour, the upstream gradient the last.
        backward(
            "balance_loss backward",
            size,
            vec![logits(), choices(), scalar()],
            &[0],
            balance,
        ),
        case("z_loss", size, vec![logits()], z_loss),
        backward(
            "z_loss backward",
            size,
            vec![logits(), scalar()],
            &[0],
            z_loss,
        ),
    ]
}

/// The rows of latent experts' groups.
fn combinations() -> Vec<Case> {
    let [tokens, top_k, experts] = MANY;
    let width = 64;
    let size = "32768 pairs of 64, 16 groups";
    let latents = || f(&[tokens * top_k, width]);
    let gates = || f(&[tokens, top_k]);
    let combine = move |g: &mut Graph, v: &[Value], segments| {
        let groups = g.active_groups(segments, experts, 16)?;
        let y = g.combine(v[0], v[1], &groups)?;
        Ok(vec![groups.rows(), y])
    };
    vec![
        Case {
            name: "combine".to_owned(),
            size: size.to_owned(),
            operands: vec![latents(), gates(), i(&[tokens, top_k], experts)],
            prepare: Box::new(move |g, v| {
                let segments = g.segments(v[2], experts)?;
                let groups = g.active_groups(segments, experts, 16)?;
                Ok(Before {
                    values: vec![groups.rows()],
                    groups: vec![groups],
                    ..Before::default()
                })
            }),
            build: Box::new(|g, v, before| Ok(vec![g.combine(v[0], v[1], &before.groups[0])?])),
        },
        of_sorted(
            "combine backward",
            size,
            vec![latents(), gates(), latents()],
            MANY,
            combine,
            |g, v, before| g.gradients_from(&[(before.values[3], v[2])], &v[..2]),
        ),
    ]
}

/// Mixtures of the cores that tokens were routed to.
fn routed_cores() -> Vec<Case> {
    let mix = |g: &mut Graph, v: &[Value], segments| {
        let routed = routed(v[2], segments);
        Ok(vec![g.mix_routed_cores(
            v[0],
            v[1],
            routed,
            CoreMix::Auto,
        )?])
    };
    let size = "512x16, 2 of 8 experts";
    let (z, core, gates) = (
        f(&[TOKENS, RANK]),
        f(&[EXPERTS, RANK, RANK]),
        f(&[TOKENS, TOP_K]),
    );
    let routing = [TOKENS, TOP_K, EXPERTS];
    let operands = vec![z.clone(), core, gates, z];
    vec![
        grouped(
            "mix_routed_cores",
            size,
            operands[..3].to_vec(),
            routing,
            mix,
        ),
        of_sorted(
            "mix_routed_cores backward",
            size,
            operands,
            routing,
            mix,
            |g, v, before| g.gradients_from(&[(before.values[2], v[3])], &v[..3]),
        ),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = mixing();
    cases.extend(routed_cores());
    cases.extend(routers());
    cases.extend(combinations());
    cases
}
