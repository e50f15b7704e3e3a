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

/// One of the matrices that every group, or every expert, of a layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LatentPart {
    /// `groups` or `experts`.
    of: &'static str,
    /// How many groups or experts there are.
    count: usize,
    part: &'static str,
    /// Rows and columns.
    pub(crate) shape: [usize; 2],
}

impl LatentPart {
    /// The names of the matrices in a layer of this path.
    pub(crate) fn names(self, path: &str) -> impl Iterator<Item = String> {
        (0..self.count).map(move |number| latent_name(path, self.of, number, self.part))
    }
}

/// All matrices of a layer of E experts, in G groups, with hidden, intermediate and latent widths n, m and l.
pub(crate) fn latent_parts(
    experts: usize,
    groups: usize,
    [n, m, l]: [usize; 3],
    factored_down: bool,
) -> Vec<LatentPart> {
    let [gate_expert, up_expert, down, down_expert] = LATENT_EXPERT_PARTS;
    let [gate_latent, up_latent, down_latent] = LATENT_GROUP_PARTS;
    let of_groups = |part, shape| LatentPart {
        of: "groups",
        count: groups,
        part,
        shape,
    };
    let of_experts = |part, shape| LatentPart {
        of: "experts",
        count: experts,
        part,
        shape,
    };
    let mut parts = vec![
        of_groups(gate_latent, [l, n]),
        of_groups(up_latent, [l, n]),
        of_experts(gate_expert, [m, l]),
        of_experts(up_expert, [m, l]),
    ];
    if factored_down {
        parts.push(of_groups(down_latent, [n, l]));
        parts.push(of_experts(down_expert, [l, m]));
    } else {
        parts.push(of_experts(down, [n, m]));
    }
    parts
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
