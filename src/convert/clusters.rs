//! Clusters of equal size.

use faer::{Mat, MatRef};

use crate::convert::gaussian::Gaussian;
use crate::convert::subspace::product;

/// Rounds of assignment and update; a few dozen are enough for any layer seen, and ties could go on for ever.
const ROUNDS: usize = 50;

/// k-means with clusters of one size, by the cosine of the angle between rows and the means of clusters: which cluster each row of `rows` is in.
///
/// The first means are rows, each next one drawn with the probability of its squared distance to the nearest so far (k-means++). In every round the pairs of
/// a row and a cluster are taken in the order of their cosines, while the row is free and the cluster has room. Clusters are numbered by their lowest row.
pub(crate) fn equal_clusters(rows: MatRef<'_, f32>, clusters: usize, seed: u64) -> Vec<usize> {
    let rows = unit_rows(rows);
    let (count, width) = (rows.nrows(), rows.ncols());
    let size = count / clusters;
    let mut means = first_means(&rows, clusters, &mut Gaussian::new(seed));
    let mut cluster_of = Vec::new();
    for _ in 0..ROUNDS {
        let next = fill(&product(rows.as_ref(), means.transpose()), size);
        if next == cluster_of {
            break;
        }
        cluster_of = next;
        means = Mat::zeros(clusters, width);
        for column in 0..width {
            for row in 0..count {
                means[(cluster_of[row], column)] += rows[(row, column)];
            }
        }
        means = unit_rows(means.as_ref());
    }
    let mut number = vec![usize::MAX; clusters];
    let mut next = 0;
    for cluster in &mut cluster_of {
        if number[*cluster] == usize::MAX {
            number[*cluster] = next;
            next += 1;
        }
        *cluster = number[*cluster];
    }
    cluster_of
}

/// Rows of length 1; a row of zeros stays one.
fn unit_rows(matrix: MatRef<'_, f32>) -> Mat<f32> {
    let lengths: Vec<f32> = (0..matrix.nrows())
        .map(|row| {
            let square: f64 = (0..matrix.ncols())
                .map(|column| f64::from(matrix[(row, column)]).powi(2))
                .sum();
            if square > 0.0 {
                square.sqrt() as f32
            } else {
                1.0
            }
        })
        .collect();
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| {
        matrix[(row, column)] / lengths[row]
    })
}

fn first_means(rows: &Mat<f32>, clusters: usize, random: &mut Gaussian) -> Mat<f32> {
    let count = rows.nrows();
    let mut means = Mat::zeros(clusters, rows.ncols());
    let mut distance = vec![1.0_f64; count];
    for cluster in 0..clusters {
        let mut left = random.uniform() * distance.iter().sum::<f64>();
        let chosen = distance.iter().position(|d| {
            left -= d;
            left < 0.0
        });
        // Rounding can leave a rest; equal rows leave no distance at all.
        let chosen = chosen.unwrap_or(cluster % count);
        let mean = rows.as_ref().row(chosen);
        means.as_mut().row_mut(cluster).copy_from(mean);
        for (row, distance) in distance.iter_mut().enumerate() {
            let cosine: f64 = (0..rows.ncols())
                .map(|column| f64::from(rows[(row, column)]) * f64::from(mean[column]))
                .sum();
            let to_this = (1.0 - cosine).max(0.0);
            *distance = if cluster == 0 {
                to_this
            } else {
                distance.min(to_this)
            };
        }
    }
    means
}

fn fill(cosines: &Mat<f32>, size: usize) -> Vec<usize> {
    let (count, clusters) = (cosines.nrows(), cosines.ncols());
    let mut pairs: Vec<(usize, usize)> = (0..count)
        .flat_map(|row| (0..clusters).map(move |cluster| (row, cluster)))
        .collect();
    // Stable: equal cosines stay in the order of rows.
    pairs.sort_by(|a, b| cosines[*b].total_cmp(&cosines[*a]));
    let mut cluster_of = vec![usize::MAX; count];
    let mut room = vec![size; clusters];
    for (row, cluster) in pairs {
        if cluster_of[row] == usize::MAX && room[cluster] > 0 {
            cluster_of[row] = cluster;
            room[cluster] -= 1;
        }
    }
    cluster_of
}
