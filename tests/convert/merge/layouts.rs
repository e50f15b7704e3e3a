//! Weights that lie transposed, and experts whose widths do not say how they lie.

use rankmix::convert::MergeOptions;
use rankmix::formats::{
    Checkpoint, Dtype, ExpertOrientation, FusedExperts, LoraPair, PeftAdapter, Target,
};
use rankmix::{Result, Tensor};
use serde_json::json;

use super::{assert_close, floats, fused, merge, merged_alone, pair, sum, write_model};

#[test]
fn weights_that_lie_transposed_are_changed_by_the_transpose() -> Result<()> {
    let mut lora =
        PeftAdapter::of_pairs([("a".to_owned(), pair(Target::Linear, [6, 2, 8], 1))].into());
    lora.config.fan_in_fan_out = true;
    let options = MergeOptions::default();
    let [before, after] = merged_alone("a.weight", &[8, 6], &lora, &options)?;
    let pair = &lora.pairs["a"];
    assert_close("a", &after, &sum(&before, &pair.a, &pair.b, true), 1e-6);
    let error = merged_alone("a.weight", &[6, 8], &lora, &options).expect_err("it is transposed");
    assert!(error.to_string().contains("[8, 6]"), "{error}");
    Ok(())
}

/// Experts of equal widths, alone and beside a tensor whose widths differ.
#[test]
fn which_width_experts_read_is_never_guessed() -> Result<()> {
    for orientation in [
        ExpertOrientation::LastIsInput,
        ExpertOrientation::MiddleIsInput,
    ] {
        let transposed = orientation == ExpertOrientation::MiddleIsInput;
        let (both, down) = (fused(16, 8, orientation, 1), fused(8, 8, orientation, 30));
        let mut pairs = vec![("m.experts".to_owned(), down.to_pair()?)];
        let adapter = |pairs: &[(String, LoraPair)]| {
            let mut lora = PeftAdapter::of_pairs(pairs.iter().cloned().collect());
            (lora.config.rank, lora.config.alpha) = (2, 4.0);
            lora.config.rank_pattern.clear();
            lora.config.alpha_pattern.clear();
            let parameters = json!(["experts.gate_up_proj", "experts.down_proj"]);
            let others = &mut lora.config.others;
            others.insert("target_parameters".to_owned(), parameters);
            lora
        };
        let options = MergeOptions::default();
        let alone = merged_alone(
            "m.experts.down_proj",
            &[3, 8, 8],
            &adapter(&pairs),
            &options,
        );
        let error = alone.expect_err("two equal widths").to_string();
        assert!(
            error.contains("`m.experts.down_proj`") && error.contains("equal widths"),
            "{error}"
        );

        pairs.push(("m.experts.base_layer".to_owned(), both.to_pair()?));
        let folder = tempfile::tempdir().expect("a folder of its own");
        let folder = folder.path();
        let wide = if transposed { [3, 8, 16] } else { [3, 16, 8] };
        let tensors = [("gate_up_proj", wide), ("down_proj", [3, 8, 8])];
        let tensors =
            tensors.map(|(name, shape)| (format!("m.experts.{name}"), shape.to_vec(), Dtype::F32));
        write_model(&folder.join("model"), &tensors, &json!({}));
        adapter(&pairs).write(folder.join("lora"))?;
        merge(folder, &options)?;
        let (before, after) = (
            Checkpoint::open(folder.join("model"))?,
            Checkpoint::open(folder.join("out"))?,
        );
        for ((name, shape, _), fused) in tensors.iter().zip([&both, &down]) {
            let each = shape[1] * shape[2];
            let (old, new) = (before.tensor(name)?.to_f32(), after.tensor(name)?.to_f32());
            for (expert, (a, b)) in fused.experts.iter().enumerate() {
                let of = |all: &[f32]| {
                    Tensor::f32([shape[1], shape[2]], all[expert * each..][..each].to_vec())
                };
                assert_close(name, &of(&new)?, &sum(&of(&old)?, a, b, transposed), 1e-6);
            }
        }
    }
    Ok(())
}

/// More or fewer experts than the model has, another rank than the configuration says, tensors of nothing.
#[test]
fn ranks_are_those_of_the_model_and_the_configuration() -> Result<()> {
    let experts = |count: usize| FusedExperts {
        experts: (0..count)
            .map(|e| (floats(&[2, 5], e), floats(&[8, 2], 9 + e)))
            .collect(),
        orientation: ExpertOrientation::LastIsInput,
        scale: 2.0,
    };
    let adapter = |path: &str, pair: LoraPair| {
        let mut lora = PeftAdapter::of_pairs([(path.to_owned(), pair)].into());
        (lora.config.rank, lora.config.alpha) = (2, 4.0);
        let parameters = json!(["experts.down_proj"]);
        let others = &mut lora.config.others;
        others.insert("target_parameters".to_owned(), parameters);
        lora
    };
    let options = MergeOptions::default();
    let name = "m.experts.down_proj";
    let of = |count| {
        adapter(
            "m.experts",
            experts(count).to_pair().expect("experts alike"),
        )
    };
    merged_alone(name, &[3, 8, 5], &of(3), &options)?;
    for count in [1, 2, 6] {
        let error = merged_alone(name, &[3, 8, 5], &of(count), &options);
        let error = error.expect_err("another number of experts").to_string();
        assert!(error.contains("another model"), "{count}: {error}");
    }
    let wide = adapter("q", pair(Target::Linear, [6, 4, 8], 1));
    let error = merged_alone("q.weight", &[6, 8], &wide, &options).expect_err("rank 4, not 2");
    assert!(error.to_string().contains("rank 4"), "{error}");
    let nothing = FusedExperts {
        experts: Vec::new(),
        ..experts(0)
    };
    let empty = Tensor::f32([0, 8, 5], Vec::new())?;
    assert!(nothing.merge(&empty).is_ok_and(|merged| merged == empty));
    let thin = FusedExperts {
        experts: vec![(
            Tensor::f32([2, 5], vec![1.0; 10])?,
            Tensor::f32([0, 2], Vec::new())?,
        )],
        ..experts(0)
    };
    assert!(thin.merge(&Tensor::f32([1, 0, 5], Vec::new())?).is_err());
    Ok(())
}
