//! `rankmix inspect`.

mod adapters;
mod mixtures;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rankmix::Result;
use rankmix::formats::{Adapter, Checkpoint, GgufFile, GgufValue};

/// What to look at.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A safetensors or GGUF file, a model's index, or the folder of a model or of an adapter.
    path: PathBuf,
    /// List every tensor by itself, with its place in the file.
    #[arg(long)]
    all: bool,
}

/// A tensor as any format has it.
struct Row {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    offset: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let path = &options.path;
    if path
        .extension()
        .is_some_and(|extension| extension == "gguf")
    {
        gguf(path, options.all)?;
    } else if path.join("adapter_config.json").exists() {
        adapters::print(path, options.all)?;
    } else {
        model(path, options.all)?;
        if path.join("adapter_model.safetensors").exists()
            && let Err(error) = Adapter::read(path)
        {
            eprintln!("rankmix: warning: this is no adapter: {error}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn gguf(path: &Path, all: bool) -> Result<()> {
    let file = GgufFile::open(path)?;
    println!("{}: GGUF", path.display());
    for (key, value) in file.metadata() {
        println!("  {key} = {}", shown(value));
    }
    let rows = file.tensors().iter().map(|(name, tensor)| Row {
        name: name.clone(),
        dtype: tensor.ty.to_string(),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes() as u64,
        offset: Some(tensor.offset),
    });
    print_rows(rows.collect(), all);
    if file.value("general.type").and_then(GgufValue::as_text) == Some("adapter") {
        let (alpha, pairs) = file.lora()?;
        println!(
            "LoRA adapter: alpha {alpha}, for {}",
            number(pairs.len(), "weight")
        );
    }
    Ok(())
}

/// A text in one line, of a long one the beginning.
fn beginning(text: &str) -> String {
    if text.chars().count() > 80 {
        let beginning: String = text.chars().take(77).collect();
        format!("{beginning:?}...")
    } else {
        format!("{text:?}")
    }
}

/// A value of the metadata in one line; of long arrays the beginning.
fn shown(value: &GgufValue) -> String {
    const SHOWN: usize = 6;
    match value {
        GgufValue::Text(text) => beginning(text),
        GgufValue::Array(_, values) => {
            let first: Vec<String> = values.iter().take(SHOWN).map(shown).collect();
            let more = if values.len() > SHOWN { ", ..." } else { "" };
            format!(
                "[{}{more}] ({})",
                first.join(", "),
                number(values.len(), "value")
            )
        }
        GgufValue::U8(value) => value.to_string(),
        GgufValue::I8(value) => value.to_string(),
        GgufValue::U16(value) => value.to_string(),
        GgufValue::I16(value) => value.to_string(),
        GgufValue::U32(value) => value.to_string(),
        GgufValue::I32(value) => value.to_string(),
        GgufValue::F32(value) => value.to_string(),
        GgufValue::Bool(value) => value.to_string(),
        GgufValue::U64(value) => value.to_string(),
        GgufValue::I64(value) => value.to_string(),
        GgufValue::F64(value) => value.to_string(),
    }
}

fn rows_of(checkpoint: &Checkpoint) -> Vec<Row> {
    let tensors = checkpoint.tensors();
    tensors
        .map(|(name, entry)| Row {
            name: name.to_owned(),
            dtype: format!("{:?}", entry.dtype),
            shape: entry.shape.clone(),
            bytes: entry.bytes() as u64,
            offset: None,
        })
        .collect()
}

fn model(path: &Path, all: bool) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let files = number(checkpoint.files().count(), "file");
    println!("{}: safetensors, {files}", path.display());
    for (key, value) in checkpoint.metadata() {
        println!("  {key} = {}", beginning(value));
    }
    print_rows(rows_of(&checkpoint), all);
    mixtures::print(path);
    Ok(())
}

fn counted(names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// A name with `*` in place of every part that is a number.
fn pattern(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if is_number { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}

/// The tensors; those whose names differ in numbers alone in one line.
fn print_rows(rows: Vec<Row>, all: bool) {
    let count = rows.len();
    let elements: u64 = rows.iter().map(|row| elements(&row.shape)).sum();
    let bytes: u64 = rows.iter().map(|row| row.bytes).sum();
    let mut lines: Vec<(String, String, Vec<usize>, u64, String)> = Vec::new();
    for row in rows {
        let name = if all { row.name } else { pattern(&row.name) };
        let place = match row.offset {
            Some(offset) if all => format!("at byte {offset}"),
            _ => String::new(),
        };
        let same = lines.iter_mut().find(|(other, dtype, shape, ..)| {
            !all && *other == name && *dtype == row.dtype && *shape == row.shape
        });
        match same {
            Some((_, _, _, times, _)) => *times += 1,
            None => lines.push((name, row.dtype, row.shape, 1, place)),
        }
    }
    let width = lines.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    for (name, dtype, shape, times, place) in lines {
        let times = if times > 1 {
            format!("x {times}")
        } else {
            place
        };
        println!(
            "{}",
            format!("  {name:<width$}  {dtype:<5} {shape:?} {times}").trim_end()
        );
    }
    let tensors = number(count, "tensor");
    println!(
        "{tensors}, {elements} elements, {:.2} MB",
        bytes as f64 / 1e6
    );
}

fn number(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&extent| extent as u64).product()
}
