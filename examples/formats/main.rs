//! Adapters in the formats of others and in ours: a LoRA layer's matrices are written as a folder of PEFT and as a GGUF adapter, read back, merged into the weight
//! underneath, and compared; RotMoLE and CoMoL layers in our layout, and an expert of each as a folder of PEFT.
//!
//! `cargo run --release --example formats -- OUT_DIR`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rankmix::formats::{
    GgufFile, GgufLora, GgufType, GgufValue, GgufWriter, LoraConfig, LoraPair, MixtureAdapter,
    MixtureLayer, PeftAdapter, Target, TensorFile,
};
use rankmix::layers::{AdapterOptions, CoMol, GateInput, Linear, Lora, RotMole, Routing};
use rankmix::ops::Rotation;
use rankmix::{Device, Graph, Init, ParameterStore, Result, Tensor, TensorType};

const LAYER: &str = "model.layers.0.self_attn.q_proj";
const D_IN: usize = 64;
const D_OUT: usize = 48;
const RANK: usize = 4;
const ALPHA: f32 = 8.0;

/// Numbers around 0 that are all different.
fn spread(dims: [usize; 2], seed: usize) -> Result<Tensor> {
    let numbers = (0..dims[0] * dims[1]).map(|i| ((i + 7919 * seed) as f32).sin());
    Tensor::f32(dims, numbers.collect())
}

fn largest_difference(one: &Tensor, other: &Tensor) -> f32 {
    let pairs = one.to_f32().into_iter().zip(other.to_f32());
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Mixtures in our layout, and one expert of each as PEFT has it.
fn mixtures(folder: &Path) -> Result<()> {
    let base = Linear::new(LAYER, D_IN, D_OUT);
    let options = AdapterOptions::new(RANK, ALPHA);
    let routing = Routing::new(4, 2);
    let rotated = |gate_input| {
        RotMole::with_rotation(base.clone(), options, routing, Rotation::Planes, gate_input)
    };
    let comol = CoMol::new(base.clone(), options, 4)?;
    for (name, layer) in [
        ("rotmole", rotated(GateInput::Input)?.into()),
        ("rotmole-static", rotated(GateInput::Static)?.into()),
        ("comol", comol.into()),
    ] {
        mixture(folder, name, layer)?;
    }
    Ok(())
}

fn mixture(folder: &Path, name: &str, layer: MixtureLayer) -> Result<()> {
    // As it would be after training: numbers in every parameter.
    let mut adapter = MixtureAdapter::default();
    for (seed, (parameter, dims)) in layer.parameters()?.into_iter().enumerate() {
        let count = dims.iter().product();
        let numbers = spread([1, count], seed + 3)?.to_f32();
        let tensor = Tensor::f32(dims, numbers)?;
        adapter.tensors.insert(parameter, tensor);
    }
    adapter.layers.insert(LAYER.to_owned(), layer);
    let path = folder.join(name);
    adapter.write(&path)?;
    let read = MixtureAdapter::read(&path)?;
    assert_eq!(read, adapter, "our layout gave something else back");
    println!("{}: read back bit for bit", path.display());
    let path = folder.join(format!("{name}-expert"));
    read.expert(2)?.write(&path)?;
    println!("{}: one expert as LoRA", path.display());
    Ok(())
}

fn main() -> Result<()> {
    let folder = PathBuf::from(
        std::env::args()
            .nth(1)
            .unwrap_or_else(|| "formats-out".to_owned()),
    );
    let peft = folder.join("peft");

    // A layer with its adapter, as it would be after training.
    let mut graph = Graph::new();
    let x = graph.input("x", TensorType::f32([16, D_IN]))?;
    let options = AdapterOptions::new(RANK, ALPHA);
    let adapted = Lora::new(Linear::new(LAYER, D_IN, D_OUT), options)?.forward(&mut graph, x)?;
    let merged = graph.parameter("merged", [D_OUT, D_IN], Init::Zeros, false)?;
    let plain = graph.matmul_nt(x, merged)?;
    graph.output(adapted)?;
    graph.output(plain)?;
    let device = Device::open()?;
    let store = ParameterStore::new(&device);
    store.initialize(&graph, 1)?;
    store.insert(&format!("{LAYER}.lora_b"), &spread([D_OUT, RANK], 1)?)?;

    // To PEFT and back.
    let pair = LoraPair {
        target: Target::Linear,
        a: store.read(&format!("{LAYER}.lora_a"))?,
        b: store.read(&format!("{LAYER}.lora_b"))?,
        bias: None,
        scale: f64::from(ALPHA) / RANK as f64,
    };
    let mut config = LoraConfig {
        rank: RANK,
        alpha: ALPHA.into(),
        ..LoraConfig::default()
    };
    let targets = vec!["q_proj"].into();
    config.others.insert("target_modules".to_owned(), targets);
    let adapter = PeftAdapter {
        config,
        pairs: BTreeMap::from([(LAYER.to_owned(), pair)]),
        others: BTreeMap::new(),
    };
    adapter.write(&peft)?;
    let read = PeftAdapter::read(&peft)?;
    assert_eq!(read, adapter, "PEFT's folder gave something else back");
    println!("{}: read back bit for bit", peft.display());

    // Merged into the weight underneath it computes the same.
    let weight = store.read(&format!("{LAYER}.weight"))?;
    let Some(whole) = read.merged(LAYER, &weight)? else {
        unreachable!("the adapter just written has this layer");
    };
    store.insert("merged", &whole)?;
    let mut session = graph.compile(&store)?;
    session.set("x", &spread([16, D_IN], 2)?)?;
    let outputs = session.run_reading(&[adapted, plain])?;
    let difference = largest_difference(&outputs[0], &outputs[1]);
    println!(
        "adapter against merged weight on {}: {difference:.1e} apart",
        device.name()
    );
    assert!(difference < 1e-4, "merging changes what the layer computes");

    // To GGUF, in 32 and in 16 bits, and a model of one weight.
    let pairs: Vec<GgufLora> = read
        .pairs
        .values()
        .map(|pair| GgufLora {
            weight: "blk.0.attn_q.weight".to_owned(),
            a: pair.a.clone(),
            b: pair.b.clone(),
        })
        .collect();
    for (name, ty) in [
        ("adapter-f32.gguf", GgufType::F32),
        ("adapter-f16.gguf", GgufType::F16),
    ] {
        let path = folder.join(name);
        GgufWriter::lora("llama", ALPHA, &pairs, ty)?.write(&path)?;
        let (alpha, read) = GgufFile::open(&path)?.lora()?;
        let apart = largest_difference(&read[0].b, &pairs[0].b);
        println!("{}: alpha {alpha}, B {apart:.1e} apart", path.display());
    }
    let mut model = GgufWriter::new();
    model.value("general.architecture", GgufValue::Text("llama".to_owned()))?;
    model.value("llama.block_count", GgufValue::U32(1))?;
    model.tensor("blk.0.attn_q.weight", &whole, GgufType::F16)?;
    model.write(folder.join("model.gguf"))?;
    for (name, weight) in [("base.safetensors", weight), ("model.safetensors", whole)] {
        let tensors = BTreeMap::from([(format!("{LAYER}.weight"), weight)]);
        let metadata = BTreeMap::new();
        TensorFile { tensors, metadata }.write(folder.join(name))?;
    }
    mixtures(&folder)?;
    println!(
        "look at them: cargo run --release --features cli -- inspect {}",
        peft.display()
    );
    Ok(())
}
