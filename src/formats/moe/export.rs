//! The matrices of a layer's experts, one by one under the names that they have in a checkpoint.

use std::borrow::Cow;

use crate::error::{Error, Result};
use crate::formats::moe::latent::latent_name;
use crate::formats::moe::layout::{LATENT_EXPERT_PARTS, LATENT_GROUP_PARTS, MoeLayout};
use crate::formats::{LatentDown, LatentExperts, MoeExperts};
use crate::tensor::{Tensor, TensorData};

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

/// The matrices of a tensor of three extents, in 32 bits, each under the name of its number. Elements of other types are converted matrix by matrix.
fn matrices<'a>(
    tensor: &'a Tensor,
    name: impl Fn(usize) -> String,
) -> impl Iterator<Item = NamedMatrix<'a>> {
    let (count, shape) = match *tensor.shape().dims() {
        [count, rows, columns] => (count, [rows, columns]),
        _ => (0, [0; 2]),
    };
    let each = shape[0] * shape[1];
    (0..count).map(move |number| {
        let range = number * each..(number + 1) * each;
        NamedMatrix {
            name: name(number),
            shape,
            elements: match tensor.data() {
                TensorData::F32(elements) => Cow::Borrowed(&elements[range]),
                TensorData::F64(elements) => elements[range].iter().map(|&x| x as f32).collect(),
                TensorData::I32(elements) => elements[range].iter().map(|&x| x as f32).collect(),
            },
        }
    })
}

impl MoeExperts {
    /// Every matrix under the name that it has in a checkpoint of a layout with a tensor for each, for the layer of this path (`model.layers.0.mlp`): the gate projections
    /// of all experts, then those of up and down.
    ///
    /// # Errors
    /// As [`MoeExperts::extents`]; [`Error::Setting`] for the other layouts.
    pub fn named<'a>(&'a self, path: &str, layout: MoeLayout) -> Result<Vec<NamedMatrix<'a>>> {
        self.extents()?;
        let Some(parts) = layout.projections() else {
            return Err(Error::setting(
                "layout",
                layout.name(),
                "its experts have no matrices of their own",
            ));
        };
        let parts = parts.into_iter().zip([&self.gate, &self.up, &self.down]);
        Ok(parts
            .flat_map(|(part, tensor)| {
                matrices(tensor, move |number| expert_name(path, number, part))
            })
            .collect())
    }
}

/// `PATH.experts.{e}.PART`.
fn expert_name(path: &str, number: usize, part: &str) -> String {
    latent_name(path, "experts", number, part)
}

/// The names and shapes of all that [`MoeExperts::named`] gives, for E experts of hidden and intermediate widths n and m; none for the other layouts.
#[cfg(feature = "convert")]
pub(crate) fn expert_shapes(
    path: &str,
    layout: MoeLayout,
    experts: usize,
    [n, m]: [usize; 2],
) -> impl Iterator<Item = (String, [usize; 2])> {
    let parts = layout.projections().into_iter().flatten();
    parts
        .zip([[m, n], [m, n], [n, m]])
        .flat_map(move |(part, shape)| {
            (0..experts).map(move |number| (expert_name(path, number, part), shape))
        })
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
        let parts = parts.into_iter();
        Ok(parts
            .flat_map(|(of, part, tensor)| {
                matrices(tensor, move |number| latent_name(path, of, number, part))
            })
            .collect())
    }
}
