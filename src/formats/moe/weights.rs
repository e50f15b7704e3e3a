//! The matrices of one layer's experts.

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The matrices of E feed-forward experts of hidden width n and intermediate width m, as [`Moe`](crate::layers::Moe) has them.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeExperts {
    /// `[E, m, n]`.
    pub gate: Tensor,
    /// `[E, m, n]`.
    pub up: Tensor,
    /// `[E, n, m]`.
    pub down: Tensor,
}

/// The down projections of latent experts.
#[derive(Clone, Debug, PartialEq)]
pub enum LatentDown {
    /// `[E, n, m]`.
    Whole(Tensor),
    /// Through a latent of the group.
    Factored {
        /// `[G, n, l]`.
        latent: Tensor,
        /// `[E, l, m]`.
        expert: Tensor,
    },
}

/// The matrices of E experts in G groups that share their projections into latents of width l, as [`LatentMoe`](crate::layers::LatentMoe) has
/// them; the experts in the order of the checkpoint, whatever their groups.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentExperts {
    /// `[G, l, n]`.
    pub gate_latent: Tensor,
    /// `[G, l, n]`.
    pub up_latent: Tensor,
    /// `[E, m, l]`.
    pub gate_expert: Tensor,
    /// `[E, m, l]`.
    pub up_expert: Tensor,
    /// The down projections.
    pub down: LatentDown,
    /// The group of each expert; every group has the same number of them.
    pub expert_to_group: Vec<usize>,
}

/// The three extents of a tensor that `what` names.
fn three(what: &'static str, tensor: &Tensor) -> Result<[usize; 3]> {
    <[usize; 3]>::try_from(tensor.shape().dims()).map_err(|_| {
        Error::shape(
            what,
            format!("{:?}: three extents are expected", tensor.shape().dims()),
        )
    })
}

fn expect(what: &'static str, tensor: &Tensor, expected: [usize; 3]) -> Result<()> {
    let found = three(what, tensor)?;
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(
        what,
        format!("{found:?}: {expected:?} is expected"),
    ))
}

/// Whether experts in these groups make `groups` groups of one size.
pub(crate) fn equal_groups(expert_to_group: &[usize], groups: usize) -> bool {
    let experts = expert_to_group.len();
    if groups == 0 || groups > experts {
        return false;
    }
    let mut sizes = vec![0; groups];
    for group in expert_to_group {
        match sizes.get_mut(*group) {
            Some(size) => *size += 1,
            None => return false,
        }
    }
    sizes.iter().all(|size| size * groups == experts)
}

impl MoeExperts {
    /// The number of experts E, the intermediate width m and the hidden width n.
    ///
    /// # Errors
    /// [`Error::Shape`] if the three do not fit each other.
    pub fn extents(&self) -> Result<[usize; 3]> {
        let [experts, intermediate, hidden] = three("gate", &self.gate)?;
        expect("up", &self.up, [experts, intermediate, hidden])?;
        expect("down", &self.down, [experts, hidden, intermediate])?;
        Ok([experts, intermediate, hidden])
    }
}

impl LatentExperts {
    /// The number of experts E, of groups G, the latent width l, the intermediate width m and the hidden width n.
    ///
    /// # Errors
    /// [`Error::Shape`] if the matrices do not fit each other, or the groups are not of one size.
    pub fn extents(&self) -> Result<[usize; 5]> {
        let [groups, latent, hidden] = three("gate_latent", &self.gate_latent)?;
        let [experts, intermediate, _] = three("gate_expert", &self.gate_expert)?;
        expect("up_latent", &self.up_latent, [groups, latent, hidden])?;
        expect(
            "gate_expert",
            &self.gate_expert,
            [experts, intermediate, latent],
        )?;
        expect(
            "up_expert",
            &self.up_expert,
            [experts, intermediate, latent],
        )?;
        match &self.down {
            LatentDown::Whole(down) => expect("down", down, [experts, hidden, intermediate])?,
            LatentDown::Factored {
                latent: shared,
                expert,
            } => {
                expect("down_latent", shared, [groups, hidden, latent])?;
                expect("down_expert", expert, [experts, latent, intermediate])?;
            }
        }
        if self.expert_to_group.len() != experts || !equal_groups(&self.expert_to_group, groups) {
            return Err(Error::shape(
                "expert_to_group",
                format!("{experts} experts are to be in {groups} groups of one size"),
            ));
        }
        Ok([experts, groups, latent, intermediate, hidden])
    }

    /// The experts of each group, in ascending order; those whose group is beyond [`LatentExperts::gate_latent`] are in none.
    #[must_use]
    pub fn members(&self) -> Vec<Vec<usize>> {
        let groups = self.gate_latent.shape().dims().first().copied();
        let mut members = vec![Vec::new(); groups.unwrap_or(0)];
        for (expert, group) in self.expert_to_group.iter().enumerate() {
            if let Some(members) = members.get_mut(*group) {
                members.push(expert);
            }
        }
        members
    }
}
