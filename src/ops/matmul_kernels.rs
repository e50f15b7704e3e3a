//! Which kernel makes a product, and its launch.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::ops::matmul::{MatMul, Sizes};
use crate::ops::shader;
use crate::ops::subgroup_tile::{SUBGROUP_TILE, subgroup_tiles};

/// Rows and columns of the result that one invocation computes, as in `shaders/matmul.wgsl`.
const TILE: usize = 8;
/// Fewer workgroups than this leave a processor idle: smaller ones are made.
const ENOUGH_GROUPS: usize = 32;
/// What is to be launched: a product, or two that are added, into a base if `accumulate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launched {
    pub(crate) first: (MatMul, Sizes),
    pub(crate) second: Option<(MatMul, Sizes)>,
    pub(crate) accumulate: bool,
}

/// Whether every stored row of both operands starts at a multiple of four elements: four neighbours are one load then.
fn aligned(options: MatMul, sizes: &Sizes) -> bool {
    let a_row = if options.transpose_a {
        sizes.m
    } else {
        sizes.k
    };
    let b_row = if options.transpose_b {
        sizes.k
    } else {
        sizes.n
    };
    a_row.is_multiple_of(4) && b_row.is_multiple_of(4)
}

pub(crate) fn launches(product: &Launched, capabilities: &Capabilities) -> Result<Launches> {
    if subgroup_tiles(capabilities) {
        return by_subgroups(product, capabilities);
    }
    let operands = [Slot::Input(0), Slot::Input(1)];
    let mut launches = vec![tiled(
        product.first,
        product.accumulate,
        operands,
        capabilities,
    )?];
    if let Some(second) = product.second {
        let operands = [Slot::Input(2), Slot::Input(3)];
        launches.push(tiled(second, true, operands, capabilities)?);
    }
    Ok(launches.into())
}

/// `shaders/matmul_subgroup.wgsl`.
fn by_subgroups(product: &Launched, capabilities: &Capabilities) -> Result<Launches> {
    let (options, sizes) = product.first;
    let Sizes { batch, m, n, k, .. } = sizes;
    // A batch entry that does not start at a multiple of four has no aligned rows.
    let starts = |batched: bool, size: usize| !batched || size.is_multiple_of(4);
    let first_aligned = aligned(options, &sizes)
        && starts(sizes.a_batched, m * k)
        && starts(sizes.b_batched, k * n);
    let whole =
        |(options, sizes): (MatMul, Sizes)| sizes.k.is_multiple_of(4) && aligned(options, &sizes);
    // The second product has no slow path of its own: one that would need it is a launch of its own.
    let (second, apart) = match product.second {
        Some(second) if whole(second) => (Some(second), None),
        second => (None, second),
    };
    // Two tiles a workgroup where that leaves enough of them and fits: side by side where b is stored by rows of k.
    let pairs_up = |along: usize, across: usize| {
        let rest = along % (2 * SUBGROUP_TILE);
        let groups = along.div_ceil(2 * SUBGROUP_TILE) * across.div_ceil(SUBGROUP_TILE) * batch;
        (rest == 0 || rest > SUBGROUP_TILE) && groups >= ENOUGH_GROUPS
    };
    let broad = !options.transpose_b && pairs_up(n, m);
    let tall = !broad && pairs_up(m, n);
    let tile = |two: bool| {
        if two {
            2 * SUBGROUP_TILE
        } else {
            SUBGROUP_TILE
        }
    };
    let (m_groups, n_groups) = (m.div_ceil(tile(tall)), n.div_ceil(tile(broad)));
    let wide = n.is_multiple_of(4);
    let (second_options, second_sizes) = second.unwrap_or(product.first);
    let (a2, b2) = if second.is_some() { (2, 3) } else { (0, 1) };
    let launch = Launch::new(
        shader!("matmul_subgroup", "subgroup_tile"),
        if wide { "wide" } else { "narrow" },
    )
    .constant("TRANSPOSE_A", options.transpose_a)
    .constant("TRANSPOSE_B", options.transpose_b)
    .constant("TRANSPOSE_A2", second_options.transpose_a)
    .constant("TRANSPOSE_B2", second_options.transpose_b)
    .constant("ALIGNED", first_aligned)
    .constant("EDGES", !first_aligned || !k.is_multiple_of(4))
    .constant("SECOND", second.is_some())
    .constant("TALL", tall)
    .constant("BROAD", broad)
    .constant("ACCUMULATE", product.accumulate)
    .read(1, Slot::Input(0))
    .read(2, Slot::Input(1))
    .write(if wide { 3 } else { 4 }, Slot::Output(0))
    .read(5, Slot::Input(a2))
    .read(6, Slot::Input(b2))
    .param(m)
    .param(n)
    .param(k)
    .param(if sizes.a_batched { m * k } else { 0 })
    .param(if sizes.b_batched { k * n } else { 0 })
    .param(options.alpha)
    .param(second_sizes.k)
    .param(second_options.alpha)
    .param(m_groups)
    .param(n_groups)
    .param(batch)
    .folded(m_groups * n_groups * batch, capabilities)?;
    let mut launches = vec![launch];
    if let Some(second) = apart {
        let operands = [Slot::Input(2), Slot::Input(3)];
        launches.push(tiled(second, true, operands, capabilities)?);
    }
    Ok(launches.into())
}

/// `shaders/matmul.wgsl`.
fn tiled(
    (options, sizes): (MatMul, Sizes),
    accumulate: bool,
    [a, b]: [Slot; 2],
    capabilities: &Capabilities,
) -> Result<Launch> {
    let Sizes {
        batch,
        m,
        n,
        k,
        a_batched,
        b_batched,
    } = sizes;
    let (m_tiles, n_tiles) = (m.div_ceil(TILE), n.div_ceil(TILE));
    // Invocations of a workgroup: a square where the result is large, along the rows where it is narrow.
    let shape = |invocations: usize| {
        let across = n_tiles.next_power_of_two().min(8);
        let down = m_tiles.next_power_of_two().min(invocations / across).max(1);
        (down, across)
    };
    let groups =
        |(down, across): (usize, usize)| (m_tiles.div_ceil(down), n_tiles.div_ceil(across));
    let mut lanes = shape(64);
    for smaller in [32, 16] {
        let (down, across) = groups(lanes);
        if down * across * batch < ENOUGH_GROUPS {
            lanes = shape(smaller);
        }
    }
    let (m_groups, n_groups) = groups(lanes);
    let whole_tiles = m.is_multiple_of(TILE) && n.is_multiple_of(TILE) && k.is_multiple_of(4);
    Launch::new(shader!("matmul"), "forward")
        .constant("LANES_M", lanes.0 as f64)
        .constant("LANES_N", lanes.1 as f64)
        .constant("TRANSPOSE_A", options.transpose_a)
        .constant("TRANSPOSE_B", options.transpose_b)
        .constant("ALIGNED", aligned(options, &sizes))
        .constant("EDGES", !whole_tiles)
        .constant("ACCUMULATE", accumulate)
        .read(1, a)
        .read(2, b)
        .write(3, Slot::Output(0))
        .param(m)
        .param(n)
        .param(k)
        .param(if a_batched { m * k } else { 0 })
        .param(if b_batched { k * n } else { 0 })
        .param(options.alpha)
        .param(m_groups)
        .param(n_groups)
        .param(batch)
        .folded(m_groups * n_groups * batch, capabilities)
}
