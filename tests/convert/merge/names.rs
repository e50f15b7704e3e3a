//! The names that PEFT gives wrapped modules, and embeddings that are the output layer too.

use rankmix::convert::{MergeOptions, merge_lora};
use rankmix::formats::{Checkpoint, Dtype, PeftAdapter, Target};
use rankmix::{Error, Result};
use serde_json::json;

use super::{
    HEAD, OUTPUT, QUERY, TABLE, assert_close, floats, merge, model, pair, sum, write_model,
};

#[test]
fn the_names_that_peft_gives_wrapped_modules_are_those_of_the_model() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    write_model(
        &folder.join("model"),
        &model(),
        &json!({"tie_word_embeddings": false}),
    );
    let pairs = [
        (TABLE.to_owned(), pair(Target::Embedding, [8, 2, 11], 7)),
        (OUTPUT.to_owned(), pair(Target::Linear, [8, 2, 6], 3)),
    ];
    let mut lora = PeftAdapter::of_pairs(pairs.into());
    lora.config.bias = "all".to_owned();
    let under = floats(&[11, 8], 70);
    let (bias, head) = (floats(&[8], 71), floats(&[11, 8], 72));
    for (key, tensor) in [
        (format!("{TABLE}.base_layer.weight"), &under),
        (format!("{OUTPUT}.base_layer.base_layer.bias"), &bias),
        (format!("{HEAD}.weight"), &head),
        (format!("{HEAD}.modules_to_save.weight"), &head),
        (format!("{HEAD}.original_module.weight"), &under),
    ] {
        lora.others
            .insert(format!("base_model.model.{key}"), tensor.clone());
    }
    lora.write(folder.join("lora"))?;
    let report = merge(folder, &MergeOptions::default())?;
    assert_eq!(report.tensors.len(), 4);
    let mut twice = lora.clone();
    let key = format!("base_model.model.{HEAD}.modules_to_save.weight");
    twice.others.insert(key, under.clone());
    twice.write(folder.join("lora"))?;
    let error = merge(
        folder,
        &MergeOptions {
            overwrite: true,
            ..MergeOptions::default()
        },
    );
    let error = error.expect_err("two weights of one name");
    assert!(
        matches!(&error, Error::DuplicateName { name, .. } if name.starts_with(HEAD)),
        "{error}"
    );
    lora.write(folder.join("lora"))?;
    let after = Checkpoint::open(folder.join("out"))?;
    let table = &lora.pairs[TABLE];
    let expected = sum(&under, &table.a, &table.b, true);
    assert_close(
        TABLE,
        &after.tensor(&format!("{TABLE}.weight"))?,
        &expected,
        1e-6,
    );
    assert_close(
        OUTPUT,
        &after.tensor(&format!("{OUTPUT}.bias"))?,
        &bias.to_f64(),
        0.0,
    );
    assert_close(
        HEAD,
        &after.tensor(&format!("{HEAD}.weight"))?,
        &head.to_f64(),
        3e-4,
    );
    // What lies under a pair has not changed, what was trained whole is gone.
    let out = folder.join("out");
    let again = |lora: &PeftAdapter| {
        lora.write(folder.join("lora"))?;
        let options = MergeOptions {
            unmerge: true,
            ..MergeOptions::default()
        };
        merge_lora(
            &out,
            &folder.join("lora"),
            &folder.join("again"),
            &options,
            &|_| {},
        )
    };
    let error = again(&lora).expect_err("a bias that was trained");
    assert!(error.to_string().contains("trained whole"), "{error}");
    lora.others.retain(|key, _| key.contains(TABLE));
    again(&lora)?;
    let again = Checkpoint::open(folder.join("again"))?;
    assert_close(
        TABLE,
        &again.tensor(&format!("{TABLE}.weight"))?,
        &under.to_f64(),
        1e-6,
    );
    Ok(())
}

#[test]
fn embeddings_that_the_output_layer_shares_are_left_alone() -> Result<()> {
    let table = |name: &str| {
        let weight = format!("base_model.model.{name}.weight");
        let mut lora =
            PeftAdapter::of_pairs([(QUERY.to_owned(), pair(Target::Linear, [6, 2, 8], 1))].into());
        lora.others.insert(weight, floats(&[11, 8], 8));
        lora
    };
    let pair = |name: &str| {
        let pair = pair(Target::Embedding, [8, 2, 11], 7);
        PeftAdapter::of_pairs([(name.to_owned(), pair)].into())
    };
    let tied = json!({"tie_word_embeddings": true});
    let nested = json!({"architectures": ["AForConditionalGeneration"], "text_config": {"tie_word_embeddings": true}});
    let apart = json!({"tie_word_embeddings": false, "llm_config": {"tie_word_embeddings": true}});
    let untied = json!({"architectures": ["AForCausalLM"], "tie_word_embeddings": false});
    let wordless = json!({"architectures": ["GPT2LMHeadModel"]});
    let encoder = json!({"architectures": ["BertModel"]});
    for (config, lora, has_head, is_refused) in [
        (&tied, pair(TABLE), true, true),
        (&tied, table(TABLE), false, true),
        (&tied, table(HEAD), true, true),
        (&tied, table(HEAD), false, true),
        (&nested, pair(TABLE), true, true),
        (&apart, pair(TABLE), false, true),
        (&wordless, pair("wte"), false, true),
        (&wordless, pair(TABLE), true, false),
        (&untied, pair(TABLE), false, false),
        (&untied, table(HEAD), true, false),
        (&encoder, pair("wte"), false, false),
    ] {
        let folder = tempfile::tempdir().expect("a folder of its own");
        let mut tensors = model();
        tensors.push(("wte.weight".to_owned(), vec![11, 8], Dtype::F32));
        tensors.retain(|(name, _, _)| has_head || !name.starts_with(HEAD));
        write_model(&folder.path().join("model"), &tensors, config);
        lora.write(folder.path().join("lora"))?;
        let merged = merge(folder.path(), &MergeOptions::default());
        match merged {
            Ok(_) => assert!(!is_refused, "{config}"),
            Err(error) => {
                let is_it = error.to_string().contains("one tensor");
                assert!(is_it && is_refused, "{config}: {error}");
            }
        }
    }
    Ok(())
}
