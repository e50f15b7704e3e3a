//! A LoRA merged into a whole model, and taken out again.

mod layouts;
mod names;
mod written;

use std::fs;
use std::path::Path;

use half::bf16;
use rankmix::convert::{MergeOptions, MergeReport, merge_lora};
use rankmix::formats::{
    Checkpoint, Dtype, ExpertOrientation, FusedExperts, LoraPair, ModelWriter, OutputTensor,
    PeftAdapter, Target,
};
use rankmix::{Error, Result, Tensor};
use serde_json::{Value, json};

const QUERY: &str = "model.layers.0.self_attn.q_proj";
const OUTPUT: &str = "model.layers.0.self_attn.o_proj";
const TABLE: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";
const EXPERTS: &str = "model.layers.0.mlp.experts";

fn floats(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let data = (0..count).map(|i| ((i * i + 31 * seed + i) as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

fn pair(target: Target, [d_out, rank, d_in]: [usize; 3], seed: usize) -> LoraPair {
    LoraPair {
        target,
        a: floats(&[rank, d_in], seed),
        b: floats(&[d_out, rank], seed + 1),
        bias: None,
        scale: 2.0,
    }
}

/// A model of one layer: its tensors' names, shapes and types.
fn model() -> Vec<(String, Vec<usize>, Dtype)> {
    vec![
        (format!("{QUERY}.weight"), vec![6, 8], Dtype::BF16),
        (format!("{OUTPUT}.weight"), vec![8, 6], Dtype::F32),
        (format!("{OUTPUT}.bias"), vec![8], Dtype::F32),
        (format!("{TABLE}.weight"), vec![11, 8], Dtype::F32),
        (format!("{HEAD}.weight"), vec![11, 8], Dtype::F16),
        (
            format!("{EXPERTS}.gate_up_proj"),
            vec![3, 10, 8],
            Dtype::F32,
        ),
        (format!("{EXPERTS}.down_proj"), vec![3, 8, 5], Dtype::F32),
        ("model.norm.weight".to_owned(), vec![8], Dtype::F16),
    ]
}

fn write_model(folder: &Path, tensors: &[(String, Vec<usize>, Dtype)], config: &Value) {
    fs::create_dir_all(folder).expect("a folder of its own");
    fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    fs::write(folder.join("tokenizer.json"), "{}").expect("a file");
    let outputs = tensors
        .iter()
        .enumerate()
        .map(|(seed, (name, shape, dtype))| {
            let data = floats(shape, 100 + seed).to_f32();
            OutputTensor::floats(name.clone(), shape, data.into(), *dtype).expect("small numbers")
        });
    ModelWriter::new(folder)
        .write_shard("model.safetensors", outputs.collect(), [].into())
        .expect("a folder of its own");
}

/// Three experts of rank 2 and scale 2.
fn fused(d_out: usize, d_in: usize, orientation: ExpertOrientation, seed: usize) -> FusedExperts {
    let matrices = |e| {
        (
            floats(&[2, d_in], seed + e),
            floats(&[d_out, 2], seed + 9 + e),
        )
    };
    FusedExperts {
        experts: (0..3).map(matrices).collect(),
        orientation,
        scale: 2.0,
    }
}

/// The matrices of the experts' two tensors, as PEFT nests them.
fn experts() -> [(String, FusedExperts); 2] {
    [
        (
            format!("{EXPERTS}.base_layer"),
            fused(10, 8, ExpertOrientation::LastIsInput, 40),
        ),
        (
            EXPERTS.to_owned(),
            fused(8, 5, ExpertOrientation::LastIsInput, 60),
        ),
    ]
}

fn adapter() -> PeftAdapter {
    let mut output = pair(Target::Linear, [8, 2, 6], 3);
    output.bias = Some(floats(&[8], 5));
    let mut pairs = vec![
        (QUERY.to_owned(), pair(Target::Linear, [6, 2, 8], 1)),
        (OUTPUT.to_owned(), output),
        (TABLE.to_owned(), pair(Target::Embedding, [8, 2, 11], 7)),
    ];
    let fused = experts().map(|(path, fused)| (path, fused.to_pair().expect("experts alike")));
    pairs.extend(fused);
    let mut adapter = PeftAdapter::of_pairs(pairs.into_iter().collect());
    // The rank of one expert, as PEFT says it.
    adapter.config.rank = 2;
    adapter.config.alpha = 4.0;
    adapter.config.rank_pattern.clear();
    adapter.config.alpha_pattern.clear();
    adapter.config.lora_bias = true;
    let parameters = json!(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]);
    let others = &mut adapter.config.others;
    others.insert("target_parameters".to_owned(), parameters);
    let head = floats(&[11, 8], 8);
    let others = &mut adapter.others;
    others.insert(format!("base_model.model.{HEAD}.weight"), head);
    adapter
}

fn merge(folder: &Path, options: &MergeOptions) -> Result<MergeReport> {
    let [model, lora, out] = ["model", "lora", "out"].map(|name| folder.join(name));
    merge_lora(&model, &lora, &out, options, &|_| {})
}

/// `before + 2 b a`, transposed if that is said, in 64 bits.
fn sum(before: &Tensor, a: &Tensor, b: &Tensor, transposed: bool) -> Vec<f64> {
    let ([rank, d_in], d_out) = ([a.shape().dims()[0], a.shape().last()], b.shape().dims()[0]);
    let (a, b) = (a.to_f64(), b.to_f64());
    let mut sum = before.to_f64();
    for (row, column) in (0..d_out).flat_map(|row| (0..d_in).map(move |column| (row, column))) {
        let at = if transposed {
            column * d_out + row
        } else {
            row * d_in + column
        };
        let products = (0..rank).map(|j| b[row * rank + j] * a[j * d_in + column]);
        sum[at] += 2.0 * products.sum::<f64>();
    }
    sum
}

fn assert_close(name: &str, found: &Tensor, expected: &[f64], limit: f64) {
    let found = found.to_f64();
    assert_eq!(found.len(), expected.len(), "{name}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= limit,
            "{name}[{at}]: {found} is not {expected}"
        );
    }
}

#[test]
fn every_kind_of_change_is_merged_and_the_rest_is_copied() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let config = json!({"tie_word_embeddings": false});
    write_model(&folder.join("model"), &model(), &config);
    let lora = adapter();
    lora.write(folder.join("lora"))?;
    let report = merge(folder, &MergeOptions::default())?;
    let (before, after) = (
        Checkpoint::open(folder.join("model"))?,
        Checkpoint::open(folder.join("out"))?,
    );
    let tensors =
        |checkpoint: &Checkpoint, path: &str| checkpoint.tensor(&format!("{path}.weight"));
    for (name, _, dtype) in model() {
        assert_eq!(
            after.entry(&name).map(|entry| entry.dtype),
            Some(dtype),
            "{name}"
        );
    }
    assert_eq!(after.tensors().count(), model().len());
    let norm = "model.norm.weight";
    assert_eq!(after.raw(norm)?, before.raw(norm)?);
    assert_eq!(
        fs::read(folder.join("out/tokenizer.json")).expect("a copy"),
        b"{}"
    );

    for (path, transposed, limit) in [
        (QUERY, false, 4e-3),
        (OUTPUT, false, 1e-6),
        (TABLE, true, 1e-6),
    ] {
        let pair = &lora.pairs[path];
        let expected = sum(&tensors(&before, path)?, &pair.a, &pair.b, transposed);
        assert_close(path, &tensors(&after, path)?, &expected, limit);
    }
    let bias = format!("{OUTPUT}.bias");
    let added = floats(&[8], 5).to_f64();
    let expected = before.tensor(&bias)?.to_f64().into_iter().zip(added);
    let expected: Vec<f64> = expected.map(|(old, bias)| old + 2.0 * bias).collect();
    assert_close(&bias, &after.tensor(&bias)?, &expected, 1e-6);
    assert_close(
        HEAD,
        &tensors(&after, HEAD)?,
        &floats(&[11, 8], 8).to_f64(),
        3e-4,
    );
    for (name, (_, fused)) in ["gate_up_proj", "down_proj"].into_iter().zip(experts()) {
        let name = format!("{EXPERTS}.{name}");
        let (old, new) = (
            before.tensor(&name)?.to_f32(),
            after.tensor(&name)?.to_f32(),
        );
        for (expert, (a, b)) in fused.experts.iter().enumerate() {
            let shape = [b.shape().dims()[0], a.shape().last()];
            let each = shape[0] * shape[1];
            let of =
                |all: &[f32]| Tensor::f32(shape, all[expert * each..(expert + 1) * each].to_vec());
            assert_close(&name, &of(&new)?, &sum(&of(&old)?, a, b, false), 1e-6);
        }
    }

    // What is said of it.
    let names: Vec<&str> = report
        .tensors
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(names.len(), 7);
    assert!(names.is_sorted() && !names.contains(&norm));
    let of = |path: &str| {
        let name = format!("{path}.weight");
        report
            .tensors
            .iter()
            .find(|tensor| tensor.name == name)
            .expect("a tensor that changed")
    };
    let query = &lora.pairs[QUERY];
    let old = tensors(&before, QUERY)?.to_f64();
    let exact = sum(&tensors(&before, QUERY)?, &query.a, &query.b, false);
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let change = norm(&mut exact.iter().zip(&old).map(|(new, old)| new - old));
    let rounded = exact.iter().map(|&x| f64::from(bf16::from_f64(x)) - x);
    let rounding = norm(&mut rounded.into_iter()) / change;
    let change = change / norm(&mut old.iter().copied());
    assert!(
        (of(QUERY).change / change - 1.0).abs() < 1e-4,
        "{} {change}",
        of(QUERY).change
    );
    assert!(
        (of(QUERY).rounding / rounding - 1.0).abs() < 1e-2,
        "{} {rounding}",
        of(QUERY).rounding
    );
    assert_eq!(of(OUTPUT).rounding, 0.0);
    let text = fs::read_to_string(folder.join("out/conversion.json")).expect("the report");
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        serde_json::from_value::<MergeReport>(document).expect("the report"),
        report
    );
    Ok(())
}

#[test]
fn what_was_merged_is_taken_out_again() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let config = json!({"tie_word_embeddings": false});
    write_model(&folder.join("model"), &model(), &config);
    let mut lora = adapter();
    lora.others.clear();
    lora.write(folder.join("lora"))?;
    merge(
        folder,
        &MergeOptions {
            dtype: Some(Dtype::F32),
            ..MergeOptions::default()
        },
    )?;
    let [out, again] = ["out", "again"].map(|name| folder.join(name));
    let options = MergeOptions {
        unmerge: true,
        ..MergeOptions::default()
    };
    merge_lora(&out, &folder.join("lora"), &again, &options, &|_| {})?;
    let (before, after) = (
        Checkpoint::open(folder.join("model"))?,
        Checkpoint::open(&again)?,
    );
    let merged = Checkpoint::open(&out)?;
    for (name, _, _) in model() {
        let expected = before.tensor(&name)?.to_f64();
        assert_close(&name, &after.tensor(&name)?, &expected, 1e-6);
        let changed = merged.tensor(&name)?.to_f64() != expected;
        assert_eq!(
            changed,
            name != "model.norm.weight" && name != "lm_head.weight",
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn adapters_of_other_models_are_refused() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let untied = json!({"tie_word_embeddings": false});
    let refused = |tensors: &[(String, Vec<usize>, Dtype)],
                   config: &Value,
                   lora: &PeftAdapter,
                   options: &MergeOptions| {
        for name in ["model", "lora"] {
            _ = fs::remove_dir_all(folder.join(name));
        }
        write_model(&folder.join("model"), tensors, config);
        lora.write(folder.join("lora"))
            .expect("a folder of its own");
        let error = merge(folder, options).expect_err("this must be refused");
        let left = fs::read_dir(folder).expect("a folder").count();
        assert_eq!(left, 2, "something was made before it was refused");
        error
    };
    let plain = MergeOptions::default();
    for (at, (name, _, _)) in model().iter().enumerate().take(7) {
        let mut without = model();
        without.remove(at);
        let error = refused(&without, &untied, &adapter(), &plain);
        let path = name.trim_end_matches(".weight");
        let is_named = [name, path, EXPERTS]
            .iter()
            .any(|name| error.to_string().contains(*name));
        assert!(
            is_named && matches!(error, Error::Setting { .. }),
            "{name}: {error}"
        );
        let mut other = model();
        let last = other[at].1.len() - 1;
        other[at].1[last] += 1;
        let error = refused(&other, &untied, &adapter(), &plain);
        let is_named = [name.as_str(), EXPERTS]
            .iter()
            .any(|name| error.to_string().contains(name));
        assert!(is_named, "{name}: {error}");
    }
    let unmerge = MergeOptions {
        unmerge: true,
        ..plain
    };
    let error = refused(&model(), &untied, &adapter(), &unmerge);
    assert!(error.to_string().contains("trained whole"), "{error}");
    Ok(())
}

/// A model of one weight or tensor of experts, an adapter of one pair for it, and the result.
fn merged_alone(
    name: &str,
    shape: &[usize],
    lora: &PeftAdapter,
    options: &MergeOptions,
) -> Result<[Tensor; 2]> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let folder = folder.path();
    let tensors = [(name.to_owned(), shape.to_vec(), Dtype::F32)];
    write_model(&folder.join("model"), &tensors, &json!({}));
    lora.write(folder.join("lora"))?;
    merge(folder, options)?;
    let of = |folder: &str, at: &Path| Checkpoint::open(at.join(folder))?.tensor(name);
    Ok([of("model", folder)?, of("out", folder)?])
}
