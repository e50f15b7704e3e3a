//! The launches of a matrix product, by each of its kernels.

use crate::device::{Capabilities, Launch, Launches, Slot};
use crate::error::Result;
use crate::ops::matmul::{MatMul, Sizes};
use crate::ops::matmul_choice::{Kernel, Split, chosen};
use crate::ops::shader;
use crate::ops::subgroup_tile::SUBGROUP_TILE;

/// Columns of the result that one invocation computes, as in `shaders/matmul.wgsl`.
const COLUMNS: usize = 8;
/// What a step of `shaders/matmul_staged.wgsl` takes of k.
const STAGED_STEP: usize = 16;
/// Invocations of a workgroup that adds up parts, as in `shaders/matmul_split.wgsl`.
const TOTAL_WORKGROUP: usize = 64;
/// Fewer workgroups than this leave a processor idle: smaller ones are made.
const ENOUGH_GROUPS: usize = 32;

/// What is to be launched: a product, or two that are added, with a bias if an input is named, into a base if `accumulate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launched {
    pub(crate) first: (MatMul, Sizes),
    pub(crate) second: Option<(MatMul, Sizes)>,
    pub(crate) bias: Option<usize>,
    pub(crate) accumulate: bool,
}

impl Launched {
    /// The two products as launches of their own, for kernels that make one: the second is added to the first.
    fn apart(&self) -> impl Iterator<Item = Single> {
        let first = Single {
            product: self.first,
            operands: [Slot::Input(0), Slot::Input(1)],
            bias: self.bias.map(Slot::Input),
            accumulate: self.accumulate,
        };
        [first].into_iter().chain(self.second.map(Single::second))
    }
}

/// One product.
#[derive(Clone, Copy, Debug)]
struct Single {
    product: (MatMul, Sizes),
    operands: [Slot; 2],
    bias: Option<Slot>,
    accumulate: bool,
}

impl Single {
    /// The second of two, added to what the first has left.
    fn second(product: (MatMul, Sizes)) -> Self {
        Self {
            product,
            operands: [Slot::Input(2), Slot::Input(3)],
            bias: None,
            accumulate: true,
        }
    }

    /// What is bound where the kernel may read a bias: without one any buffer will do.
    fn bias_slot(&self) -> Slot {
        self.bias.unwrap_or(self.operands[0])
    }
}

/// Whether every stored row of the left operand, and of the right one, starts at a multiple of four elements, in every entry of a batch: four
/// neighbours are one load then.
fn aligned_rows(options: MatMul, sizes: &Sizes) -> [bool; 2] {
    let starts = |batched: bool, size: usize| !batched || size.is_multiple_of(4);
    let Sizes { m, n, k, .. } = *sizes;
    let a_row = if options.transpose_a { m } else { k };
    let b_row = if options.transpose_b { k } else { n };
    [
        a_row.is_multiple_of(4) && starts(sizes.a_batched, m * k),
        b_row.is_multiple_of(4) && starts(sizes.b_batched, k * n),
    ]
}

/// The same of rows alone: entries of a batch may start anywhere.
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
    let kernel = chosen(product, capabilities);
    match kernel {
        Kernel::Subgroup => by_subgroups(product, capabilities),
        Kernel::Staged64 => Ok(staged(product, 64, capabilities)?.into()),
        Kernel::Staged32 => Ok(staged(product, 32, capabilities)?.into()),
        Kernel::Direct8 | Kernel::Direct4 => {
            let rows = if kernel == Kernel::Direct8 { 8 } else { 4 };
            let launches = product.apart().map(|one| direct(one, rows, capabilities));
            Ok(launches.collect::<Result<Vec<_>>>()?.into())
        }
        Kernel::Split | Kernel::SplitParts => {
            let mut launches = Launches::default();
            for one in product.apart() {
                let sizes = &one.product.1;
                let plan = if kernel == Kernel::Split {
                    Split::whole(sizes)
                } else {
                    Split::in_parts(sizes)
                };
                split(one, plan, &mut launches, capabilities)?;
            }
            Ok(launches)
        }
    }
}

/// `shaders/matmul_subgroup.wgsl`.
fn by_subgroups(product: &Launched, capabilities: &Capabilities) -> Result<Launches> {
    let (options, sizes) = product.first;
    let Sizes { batch, m, n, k, .. } = sizes;
    let first_aligned = aligned_rows(options, &sizes) == [true; 2];
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
    .constant("BIAS", product.bias.is_some())
    .read(1, Slot::Input(0))
    .read(2, Slot::Input(1))
    .write(if wide { 3 } else { 4 }, Slot::Output(0))
    .read(5, Slot::Input(a2))
    .read(6, Slot::Input(b2))
    .read(7, Slot::Input(product.bias.unwrap_or(0)))
    .param(m)
    .param(n)
    .param(k)
    .param(sizes.batch_steps()[0])
    .param(sizes.batch_steps()[1])
    .param(options.alpha)
    .param(second_sizes.k)
    .param(second_options.alpha)
    .param(m_groups)
    .param(n_groups)
    .param(batch)
    .folded(m_groups * n_groups * batch, capabilities)?;
    let mut launches = vec![launch];
    if let Some(second) = apart {
        launches.push(direct(Single::second(second), 8, capabilities)?);
    }
    Ok(launches.into())
}

/// `shaders/matmul_staged.wgsl`, in tiles of so many rows and columns.
fn staged(product: &Launched, side: usize, capabilities: &Capabilities) -> Result<Launch> {
    let (options, sizes) = product.first;
    let Sizes { batch, m, n, k, .. } = sizes;
    let (second_options, second_sizes) = product.second.unwrap_or(product.first);
    let (a2, b2) = if product.second.is_some() {
        (2, 3)
    } else {
        (0, 1)
    };
    let first_aligned = aligned_rows(options, &sizes);
    let second_aligned = aligned_rows(second_options, &second_sizes);
    let [aligned_a, aligned_b] = [0, 1].map(|side| first_aligned[side] && second_aligned[side]);
    let whole_tiles = m.is_multiple_of(side)
        && n.is_multiple_of(side)
        && k.is_multiple_of(STAGED_STEP)
        && second_sizes.k.is_multiple_of(STAGED_STEP);
    let (m_groups, n_groups) = (m.div_ceil(side), n.div_ceil(side));
    Launch::new(shader!("matmul_staged", "matrix_block"), "forward")
        .constant("LANES", (2 * side) as f64)
        .constant("TRANSPOSE_A", options.transpose_a)
        .constant("TRANSPOSE_B", options.transpose_b)
        .constant("TRANSPOSE_A2", second_options.transpose_a)
        .constant("TRANSPOSE_B2", second_options.transpose_b)
        .constant("ALIGNED_A", aligned_a)
        .constant("ALIGNED_B", aligned_b)
        .constant("EDGES", !(whole_tiles && aligned_a && aligned_b))
        .constant("SECOND", product.second.is_some())
        .constant("ACCUMULATE", product.accumulate)
        .constant("BIAS", product.bias.is_some())
        .read(1, Slot::Input(0))
        .read(2, Slot::Input(1))
        .write(3, Slot::Output(0))
        .read(4, Slot::Input(a2))
        .read(5, Slot::Input(b2))
        .read(6, Slot::Input(product.bias.unwrap_or(0)))
        .param(m)
        .param(n)
        .param(k)
        .param(sizes.batch_steps()[0])
        .param(sizes.batch_steps()[1])
        .param(options.alpha)
        .param(second_sizes.k)
        .param(second_options.alpha)
        .param(m_groups)
        .param(n_groups)
        .param(batch)
        .folded(m_groups * n_groups * batch, capabilities)
}

/// `shaders/matmul_split.wgsl`.
fn split(
    one: Single,
    plan: Split,
    launches: &mut Launches,
    capabilities: &Capabilities,
) -> Result<()> {
    let (options, sizes) = one.product;
    let Sizes { batch, m, n, k, .. } = sizes;
    let Split {
        rows,
        lanes: [lanes_m, lanes_n, lanes_k],
        parts,
        part,
    } = plan;
    let (m_groups, n_groups) = (m.div_ceil(rows * lanes_m), n.div_ceil(4 * lanes_n));
    let parted = parts > 1;
    let result = if parted {
        launches.scratch_words(parts * batch * m * n)
    } else {
        Slot::Output(0)
    };
    let with_params = |launch: Launch, groups: usize| {
        launch
            .param(m)
            .param(n)
            .param(k)
            .param(sizes.batch_steps()[0])
            .param(sizes.batch_steps()[1])
            .param(options.alpha)
            .param(m_groups)
            .param(n_groups)
            .param(batch)
            .param(part)
            .param(parts)
            .folded(groups, capabilities)
    };
    let [aligned_a, aligned_b] = aligned_rows(options, &sizes);
    let whole_tiles = m.is_multiple_of(rows) && n.is_multiple_of(4) && k.is_multiple_of(4);
    let launch = Launch::new(shader!("matmul_split", "matrix_block"), "forward")
        .constant("LANES_M", lanes_m as f64)
        .constant("LANES_N", lanes_n as f64)
        .constant("LANES_K", lanes_k as f64)
        .constant("ROWS", rows as f64)
        .constant("K_FIRST", options.transpose_b)
        .constant("TRANSPOSE_A", options.transpose_a)
        .constant("TRANSPOSE_B", options.transpose_b)
        .constant("ALIGNED_A", aligned_a)
        .constant("ALIGNED_B", aligned_b)
        .constant("EDGES", !(whole_tiles && aligned_a && aligned_b))
        .constant("PARTED", parted)
        .constant("ACCUMULATE", one.accumulate && !parted)
        .constant("BIAS", one.bias.is_some() && !parted)
        .read(1, one.operands[0])
        .read(2, one.operands[1])
        .write(3, result)
        .read(4, one.bias_slot());
    let launch = with_params(launch, m_groups * n_groups * batch * parts)?;
    launches.launches.push(launch);
    if parted {
        let total = Launch::new(shader!("matmul_split", "matrix_block"), "total")
            .constant("ACCUMULATE", one.accumulate)
            .constant("BIAS", one.bias.is_some())
            .write(3, Slot::Output(0))
            .read(4, one.bias_slot())
            .read(5, result);
        let total = with_params(total, (batch * m * n).div_ceil(TOTAL_WORKGROUP))?;
        launches.launches.push(total);
    }
    Ok(())
}

/// `shaders/matmul.wgsl`, with so many rows an invocation.
fn direct(one: Single, rows: usize, capabilities: &Capabilities) -> Result<Launch> {
    let (options, sizes) = one.product;
    let Sizes { batch, m, n, k, .. } = sizes;
    let (m_tiles, n_tiles) = (m.div_ceil(rows), n.div_ceil(COLUMNS));
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
    let whole_tiles = m.is_multiple_of(rows) && n.is_multiple_of(COLUMNS) && k.is_multiple_of(4);
    Launch::new(shader!("matmul"), "forward")
        .constant("LANES_M", lanes.0 as f64)
        .constant("LANES_N", lanes.1 as f64)
        .constant("ROWS", rows as f64)
        .constant("TRANSPOSE_A", options.transpose_a)
        .constant("TRANSPOSE_B", options.transpose_b)
        .constant("ALIGNED", aligned(options, &sizes))
        .constant("EDGES", !whole_tiles)
        .constant("ACCUMULATE", one.accumulate)
        .constant("BIAS", one.bias.is_some())
        .read(1, one.operands[0])
        .read(2, one.operands[1])
        .write(3, Slot::Output(0))
        .read(4, one.bias_slot())
        .param(m)
        .param(n)
        .param(k)
        .param(sizes.batch_steps()[0])
        .param(sizes.batch_steps()[1])
        .param(options.alpha)
        .param(m_groups)
        .param(n_groups)
        .param(batch)
        .folded(m_groups * n_groups * batch, capabilities)
}
