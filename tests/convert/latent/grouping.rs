//! Which experts share their latents.

use rankmix::convert::{GroupBy, LatentOptions, convert_layer};

use crate::random::planted_experts;

#[test]
fn consecutive_experts_share_a_group_by_id() {
    let experts = planted_experts(1, [6, 4, 12], &[0; 6], 4);
    let (latent, _) =
        convert_layer(&experts, None, &LatentOptions::new(3, 4)).expect("it converts");
    assert_eq!(latent.expert_to_group, [0, 0, 1, 1, 2, 2]);
    assert_eq!(latent.members(), [[0, 1], [2, 3], [4, 5]]);
}

#[test]
fn similarity_finds_planted_groups_in_any_order() {
    for (seed, planted) in [
        (1, vec![0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]),
        (2, vec![0, 1, 1, 0, 2, 2, 2, 1, 0, 1, 0, 2]),
        (3, vec![0, 0, 1, 0, 1, 0, 1, 1]),
    ] {
        let groups = planted.iter().max().map_or(0, |last| last + 1);
        let experts = planted_experts(seed, [planted.len(), 6, 40], &planted, 8);
        let options = LatentOptions {
            group_by: GroupBy::Similarity,
            factored_down: true,
            ..LatentOptions::new(groups, 8)
        };
        let (latent, report) = convert_layer(&experts, None, &options).expect("it converts");
        assert_eq!(latent.expert_to_group, planted);
        assert_eq!(report.expert_to_group, planted);
        assert!(report.errors.whole.unweighted < 1e-5, "{:?}", report.errors);
        let by_id = LatentOptions {
            group_by: GroupBy::Id,
            ..options
        };
        let (_, report) = convert_layer(&experts, None, &by_id).expect("it converts");
        assert!(report.errors.whole.unweighted > 0.1, "{:?}", report.errors);
    }
}
