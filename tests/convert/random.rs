//! Reproducible random matrices, and pools of so many threads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rankmix::Tensor;
use rankmix::formats::MoeExperts;

/// Normal numbers from a seed.
pub(crate) struct Random(ChaCha8Rng);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Approximately normal: the sum of twelve uniform numbers less six.
    pub(crate) fn next(&mut self) -> f64 {
        (0..12)
            .map(|_| f64::from(self.0.next_u32()) / 4_294_967_296.0)
            .sum::<f64>()
            - 6.0
    }

    pub(crate) fn matrix(&mut self, rows: usize, columns: usize) -> Vec<f64> {
        (0..rows * columns).map(|_| self.next()).collect()
    }
}

/// The result of a function that finds so many threads.
pub(crate) fn in_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("threads start")
        .install(run)
}

/// `[rows, inner]` times `[inner, columns]`, row-major.
pub(crate) fn product(a: &[f64], b: &[f64], [rows, inner, columns]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    for row in 0..rows {
        for k in 0..inner {
            let factor = a[row * inner + k];
            for column in 0..columns {
                out[row * columns + column] += factor * b[k * columns + column];
            }
        }
    }
    out
}

pub(crate) fn tensor(dims: [usize; 3], data: &[f64]) -> Tensor {
    Tensor::f32(dims, data.iter().map(|&x| x as f32).collect()).expect("the shape fits")
}

/// Independent normal numbers everywhere.
pub(crate) fn random_experts(seed: u64, [e, m, n]: [usize; 3]) -> MoeExperts {
    let mut random = Random::new(seed);
    MoeExperts {
        gate: tensor([e, m, n], &random.matrix(e * m, n)),
        up: tensor([e, m, n], &random.matrix(e * m, n)),
        down: tensor([e, n, m], &random.matrix(e * n, m)),
    }
}

/// Experts whose projections share a subspace of `width` dimensions with those of their group.
pub(crate) fn planted_experts(
    seed: u64,
    [e, m, n]: [usize; 3],
    group_of: &[usize],
    width: usize,
) -> MoeExperts {
    let mut random = Random::new(seed);
    let groups = group_of.iter().max().map_or(0, |last| last + 1);
    let mut operator = |transposed: bool| {
        let shared: Vec<_> = (0..groups).map(|_| random.matrix(width, n)).collect();
        let mut data = Vec::new();
        for &group in &group_of[..e] {
            let own = random.matrix(m, width);
            let matrix = product(&own, &shared[group], [m, width, n]);
            if transposed {
                for row in 0..n {
                    data.extend((0..m).map(|column| matrix[column * n + row]));
                }
            } else {
                data.extend(matrix);
            }
        }
        data
    };
    MoeExperts {
        gate: tensor([e, m, n], &operator(false)),
        up: tensor([e, m, n], &operator(false)),
        down: tensor([e, n, m], &operator(true)),
    }
}
