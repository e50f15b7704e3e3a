//! Small models of every family, written with the `safetensors` crate, and what their layers compute, in plain loops.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::bf16;
use rankmix::formats::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

pub(crate) const EXPERTS: usize = 4;
pub(crate) const HIDDEN: usize = 12;
pub(crate) const INTERMEDIATE: usize = 8;
pub(crate) const SHARED: usize = 6;
pub(crate) const TOP_K: usize = 2;

/// A number of a sequence that is the same everywhere.
#[derive(Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in ±`bound`, each with so few digits that 16 bits of BF16 hold it.
    pub(crate) fn take(&mut self, count: usize, bound: f32) -> Vec<f32> {
        let mut next = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let unit = (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0;
            bf16::from_f32(unit * bound).to_f32()
        };
        (0..count).map(|_| next()).collect()
    }
}

/// How families differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Mixtral,
    Qwen2,
    Qwen3,
    Olmoe,
    DeepSeekV2,
    DeepSeekV3,
    Fused,
}

pub(crate) const FAMILIES: [Family; 7] = [
    Family::Mixtral,
    Family::Qwen2,
    Family::Qwen3,
    Family::Olmoe,
    Family::DeepSeekV2,
    Family::DeepSeekV3,
    Family::Fused,
];

/// The weights of a layer, row-major.
pub(crate) struct Layer {
    pub(crate) gate: Vec<Vec<f32>>,
    pub(crate) up: Vec<Vec<f32>>,
    pub(crate) down: Vec<Vec<f32>>,
    pub(crate) router: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) shared: Option<[Vec<f32>; 3]>,
    pub(crate) shared_gate: Option<Vec<f32>>,
}

/// A tensor in a file.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A model before it is written.
pub(crate) struct Model {
    pub(crate) family: Family,
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Stored>,
    /// The mixtures, by path.
    pub(crate) layers: Vec<(String, Layer)>,
}

/// What tensors are stored in.
pub(crate) fn stored(name: String, shape: &[usize], numbers: &[f32], dtype: Dtype) -> Stored {
    let bytes = match dtype {
        Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::BF16 => numbers
            .iter()
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect(),
        other => panic!("the tests write no {other:?}"),
    };
    Stored {
        name,
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

impl Family {
    fn config(self) -> Value {
        let mut config = json!({
            "architectures": ["A"],
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "num_experts_per_tok": TOP_K,
            "rope_theta": 10000.0,
        });
        let keys = match self {
            Self::Mixtral => json!({"model_type": "mixtral", "num_local_experts": EXPERTS}),
            Self::Qwen2 => json!({"model_type": "qwen2_moe", "norm_topk_prob": false}),
            Self::Qwen3 | Self::Fused => {
                json!({"model_type": "qwen3_moe", "norm_topk_prob": true})
            }
            Self::Olmoe => json!({"model_type": "olmoe"}),
            Self::DeepSeekV2 => json!({
                "model_type": "deepseek_v2", "norm_topk_prob": false, "routed_scaling_factor": 2.5,
                "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            }),
            Self::DeepSeekV3 => json!({
                "model_type": "deepseek_v3", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
            }),
        };
        if let (Some(config), Value::Object(keys)) = (config.as_object_mut(), keys) {
            config.extend(keys);
        }
        config
    }

    pub(crate) fn block(self) -> &'static str {
        if self == Self::Mixtral {
            "block_sparse_moe"
        } else {
            "mlp"
        }
    }

    /// (softmax and not sigmoid, gates divided by their sum, scale)
    fn routing(self) -> (bool, bool, f64) {
        match self {
            Self::Mixtral | Self::Qwen3 | Self::Fused => (true, true, 1.0),
            Self::Qwen2 | Self::Olmoe => (true, false, 1.0),
            Self::DeepSeekV2 => (true, false, 2.5),
            Self::DeepSeekV3 => (false, true, 2.5),
        }
    }

    fn layer(self, seed: u64) -> Layer {
        let mut numbers = Numbers::new(seed);
        let (n, m) = (HIDDEN, INTERMEDIATE);
        let mut experts =
            |count| -> Vec<Vec<f32>> { (0..EXPERTS).map(|_| numbers.take(count, 0.5)).collect() };
        let (gate, up, down) = (experts(m * n), experts(m * n), experts(n * m));
        let has_shared = matches!(self, Self::Qwen2 | Self::DeepSeekV2 | Self::DeepSeekV3);
        let mut some = |is: bool, count| is.then(|| numbers.take(count, 0.5));
        let shared = [SHARED * n, SHARED * n, n * SHARED].map(|count| some(has_shared, count));
        let [Some(one), Some(two), Some(three)] = shared else {
            let router = some(true, EXPERTS * n).unwrap_or_default();
            return Layer {
                gate,
                up,
                down,
                router,
                bias: None,
                shared: None,
                shared_gate: None,
            };
        };
        Layer {
            gate,
            up,
            down,
            router: some(true, EXPERTS * n).unwrap_or_default(),
            bias: some(self == Self::DeepSeekV3, EXPERTS),
            shared: Some([one, two, three]),
            shared_gate: some(self == Self::Qwen2, n),
        }
    }

    fn names(self, path: &str, layer: &Layer, dtype: Dtype) -> Vec<Stored> {
        let (n, m) = (HIDDEN, INTERMEDIATE);
        let mut tensors = Vec::new();
        let mut put = |end: String, shape: &[usize], numbers: &[f32], dtype| {
            tensors.push(stored(format!("{path}.{end}"), shape, numbers, dtype));
        };
        put("gate.weight".into(), &[EXPERTS, n], &layer.router, dtype);
        if let Some(bias) = &layer.bias {
            let name = "gate.e_score_correction_bias";
            put(name.into(), &[EXPERTS], bias, Dtype::F32);
        }
        if self == Self::Fused {
            let pairs = layer.gate.iter().zip(&layer.up);
            let both: Vec<f32> = pairs
                .flat_map(|(gate, up)| [gate.clone(), up.clone()].concat())
                .collect();
            put(
                "experts.gate_up_proj".into(),
                &[EXPERTS, 2 * m, n],
                &both,
                dtype,
            );
            let down = layer.down.concat();
            put("experts.down_proj".into(), &[EXPERTS, n, m], &down, dtype);
        } else {
            let parts = if self == Self::Mixtral {
                ["w1", "w3", "w2"]
            } else {
                ["gate_proj", "up_proj", "down_proj"]
            };
            for expert in 0..EXPERTS {
                let of = [
                    (&layer.gate, [m, n]),
                    (&layer.up, [m, n]),
                    (&layer.down, [n, m]),
                ];
                for (part, (matrices, shape)) in parts.iter().zip(of) {
                    let name = format!("experts.{expert}.{part}.weight");
                    put(name, &shape, &matrices[expert], dtype);
                }
            }
        }
        if let Some(shared) = &layer.shared {
            let name = if self == Self::Qwen2 {
                "shared_expert"
            } else {
                "shared_experts"
            };
            for ((part, shape), numbers) in [
                ("gate", [SHARED, n]),
                ("up", [SHARED, n]),
                ("down", [n, SHARED]),
            ]
            .into_iter()
            .zip(shared)
            {
                put(format!("{name}.{part}_proj.weight"), &shape, numbers, dtype);
            }
        }
        if let Some(gate) = &layer.shared_gate {
            put("shared_expert_gate.weight".into(), &[1, n], gate, dtype);
        }
        tensors
    }

    /// A model whose layer 0 is dense, with `mixtures` mixtures behind it.
    pub(crate) fn model(self, mixtures: usize, dtype: Dtype) -> Model {
        let mut numbers = Numbers::new(99);
        let mut tensors = Vec::new();
        let mut put = |name: String, shape: &[usize]| {
            let count = shape.iter().product();
            tensors.push(stored(name, shape, &numbers.take(count, 1.0), dtype));
        };
        put("model.embed_tokens.weight".into(), &[20, HIDDEN]);
        for part in ["gate_proj", "up_proj", "down_proj"] {
            put(format!("model.layers.0.mlp.{part}.weight"), &[9, HIDDEN]);
        }
        for layer in 0..=mixtures {
            put(
                format!("model.layers.{layer}.self_attn.q_proj.weight"),
                &[HIDDEN, HIDDEN],
            );
        }
        tensors.push(Stored {
            name: "model.table".into(),
            dtype: Dtype::U8,
            shape: vec![5],
            bytes: vec![1, 2, 3, 254, 255],
        });
        let mut layers = Vec::new();
        for number in 1..=mixtures {
            let path = format!("model.layers.{number}.{}", self.block());
            let layer = self.layer(number as u64);
            tensors.extend(self.names(&path, &layer, dtype));
            layers.push((path, layer));
        }
        Model {
            family: self,
            config: self.config(),
            tensors,
            layers,
        }
    }
}

/// Writes tensors into a file.
pub(crate) fn write_tensors(path: &Path, tensors: &[Stored]) {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (&tensor.name, view.expect("bytes that fit the shape"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a file");
}

impl Model {
    /// Inputs of the mixtures, for a calibration, some numbers of which are larger than others.
    pub(crate) fn inputs(&self, tokens: usize, seed: u64) -> Vec<Stored> {
        let inputs = self.layers.iter().map(|(path, _)| {
            let mut numbers = Numbers::new(seed).take(tokens * HIDDEN, 1.0);
            for (i, number) in numbers.iter_mut().enumerate() {
                *number *= 3.0 / (1 + (i % HIDDEN)) as f32;
            }
            let name = format!("{path}.input");
            stored(name, &[tokens, HIDDEN], &numbers, Dtype::F32)
        });
        inputs.collect()
    }

    /// Writes the model in so many files, and two files beside it.
    pub(crate) fn write(&self, folder: &Path, files: usize) {
        fs::create_dir_all(folder.join("more")).expect("a folder that can be written to");
        fs::write(folder.join("config.json"), self.config.to_string()).expect("a file");
        fs::write(folder.join("tokenizer.json"), "{\"a\": 1}\n").expect("a file");
        fs::write(folder.join("more/notes.txt"), [0, 159, 146, 150]).expect("a file");
        let mut map = BTreeMap::new();
        for file in 0..files {
            let name = if files == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{files:05}.safetensors", file + 1)
            };
            // Every file has a part of every layer.
            let of_file = self.tensors.iter().skip(file).step_by(files);
            let views: Vec<_> = of_file
                .map(|tensor| {
                    map.insert(tensor.name.clone(), name.clone());
                    let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
                    let view = TensorView::new(dtype, shape, &tensor.bytes);
                    (&tensor.name, view.expect("bytes that fit the shape"))
                })
                .collect();
            safetensors::serialize_to_file(views, None, &folder.join(name)).expect("a file");
        }
        if files > 1 {
            let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
            let path = folder.join("model.safetensors.index.json");
            fs::write(path, index.to_string()).expect("a file");
        }
    }
}

fn times(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    let rows = matrix.chunks_exact(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
        .collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn swiglu([gate, up, down]: [&[f32]; 3], x: &[f64]) -> Vec<f64> {
    let (gate, up) = (times(gate, x), times(up, x));
    let inside: Vec<f64> = gate
        .iter()
        .zip(&up)
        .map(|(gate, up)| gate * sigmoid(*gate) * up)
        .collect();
    times(down, &inside)
}

impl Layer {
    /// What the layer makes of one token, in 64 bits.
    pub(crate) fn output(&self, family: Family, x: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let (softmax, normalised, scale) = family.routing();
        let logits = times(&self.router, &x);
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let scores: Vec<f64> = logits
            .iter()
            .map(|logit| {
                if softmax {
                    logit.exp() / sum
                } else {
                    sigmoid(*logit)
                }
            })
            .collect();
        let key = |expert: usize| {
            let bias = self
                .bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias[expert]));
            scores[expert] + bias
        };
        let mut chosen: Vec<usize> = (0..EXPERTS).collect();
        chosen.sort_by(|a, b| key(*b).total_cmp(&key(*a)));
        chosen.truncate(TOP_K);
        let sum: f64 = chosen.iter().map(|expert| scores[*expert]).sum();
        let mut y = vec![0.0; HIDDEN];
        let mut add = |factor: f64, part: Vec<f64>| {
            for (y, part) in y.iter_mut().zip(part) {
                *y += factor * part;
            }
        };
        for expert in chosen {
            let gate = scores[expert] * scale / if normalised { sum } else { 1.0 };
            let matrices = [&self.gate, &self.up, &self.down].map(|of| of[expert].as_slice());
            add(gate, swiglu(matrices, &x));
        }
        if let Some([gate, up, down]) = &self.shared {
            let factor = self
                .shared_gate
                .as_ref()
                .map_or(1.0, |gate| sigmoid(times(gate, &x)[0]));
            add(factor, swiglu([gate, up, down], &x));
        }
        y
    }
}
