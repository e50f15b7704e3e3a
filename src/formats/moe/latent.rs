//! The names of latent experts' matrices in a checkpoint.

use std::borrow::Cow;

use crate::error::Result;
use crate::formats::moe::layout::{LATENT_EXPERT_PARTS, LATENT_GROUP_PARTS};
use crate::formats::{LatentDown, LatentExperts};
use crate::tensor::Tensor;

/// One matrix of a layer, as a checkpoint has it.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedMatrix<'a> {
    /// The tensor's whole name.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The elements, row-major.
    pub elements: Cow<'a, [f32]>,
}

/// `PATH.groups.{g}.PART` or `PATH.experts.{e}.PART`.
pub(crate) fn latent_name(path: &str, of: &str, number: usize, part: &str) -> String {
    format!("{path}.{of}.{number}.{part}")
}

fn split<'a>(
    path: &str,
    of: &str,
    part: &str,
    tensor: &'a Tensor,
    matrices: &mut Vec<NamedMatrix<'a>>,
) {
    let dims = tensor.shape().dims();
    let shape = [dims[1], dims[2]];
    let each = shape[0] * shape[1];
    for number in 0..dims[0] {
        let range = number * each..(number + 1) * each;
        matrices.push(NamedMatrix {
            name: latent_name(path, of, number, part),
            shape,
            elements: match tensor.as_f32() {
                Some(floats) => Cow::Borrowed(&floats[range]),
                None => tensor.to_f64()[range].iter().map(|&x| x as f32).collect(),
            },
        });
    }
}

impl LatentExperts {
    /// Every matrix under the name that it has in a checkpoint, for the layer of this path (`model.layers.0.mlp`).
    ///
    /// # Errors
    /// As [`LatentExperts::extents`].
    pub fn named<'a>(&'a self, path: &str) -> Result<Vec<NamedMatrix<'a>>> {
        self.extents()?;
        let mut parts = vec![
            ("groups", LATENT_GROUP_PARTS[0], &self.gate_latent),
            ("groups", LATENT_GROUP_PARTS[1], &self.up_latent),
            ("experts", LATENT_EXPERT_PARTS[0], &self.gate_expert),
            ("experts", LATENT_EXPERT_PARTS[1], &self.up_expert),
        ];
        match &self.down {
            LatentDown::Whole(down) => parts.push(("experts", LATENT_EXPERT_PARTS[2], down)),
            LatentDown::Factored { latent, expert } => parts.extend([
                ("groups", LATENT_GROUP_PARTS[2], latent),
                ("experts", LATENT_EXPERT_PARTS[3], expert),
            ]),
        }
        let mut matrices = Vec::new();
        for (of, part, tensor) in parts {
            split(path, of, part, tensor, &mut matrices);
        }
        Ok(matrices)
    }
}
