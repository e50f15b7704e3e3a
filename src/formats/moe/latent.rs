//! The names of latent experts' matrices in a checkpoint.

use crate::formats::moe::layout::{LATENT_EXPERT_PARTS, LATENT_GROUP_PARTS};

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
