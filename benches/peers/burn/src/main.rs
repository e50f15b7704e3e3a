//! RotMoLE, CoMoL and the latent MoE as a user of Burn writes them, forward and backward, at the sizes that `rankmix time` has by default.
//!
//! usage: rankmix-peer-burn wgpu|flex LAYER
//!
//! Prints `seconds bytes checksum`: the median of five steps after two, what the allocator holds after them (0 where it does not say), and
//! the sum of all gradients, read back at the end of each step, so that no step is left undone.

use std::time::Instant;

use burn::prelude::*;
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{DeviceKind, Distribution, IndexingUpdateOp, Int, TensorData};

const TOKENS: usize = 512;
const WIDTH: usize = 1024;
const RANK: usize = 16;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

const MOE_TOKENS: usize = 256;
const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 256;
const LATENT: usize = 256;
const GROUPS: usize = 2;

const WARM_UP: usize = 2;
const STEPS: usize = 5;

fn normal<const D: usize>(shape: [usize; D], deviation: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, deviation), device)
}

fn trained<const D: usize>(shape: [usize; D], deviation: f64, device: &Device) -> Tensor<D> {
    normal(shape, deviation, device).require_grad()
}

/// The experts of each token, and the softmax of their logits scattered over all experts, zero for those not chosen.
fn top_k_gates(logits: Tensor<2>) -> (Tensor<2, Int>, Tensor<2>) {
    let [tokens, experts] = logits.dims();
    let (_, chosen) = logits.clone().topk_with_indices(TOP_K, 1);
    let weights = softmax(logits.gather(1, chosen.clone()), 1);
    let one_hot: Tensor<3> = chosen.clone().one_hot::<3>(experts).float();
    let gates = (one_hot * weights.unsqueeze_dim::<3>(2)).sum_dim(1);
    (chosen, gates.reshape([tokens, experts]))
}

/// The sum of the gradients of all these, after a backward pass from `output` under `upstream`.
fn gradient_sum(output: Tensor<2>, upstream: &Tensor<2>, trained: &[Tensor<2>]) -> Tensor<1> {
    let gradients = (output * upstream.clone()).sum().backward();
    let sums = trained.iter().filter_map(|tensor| tensor.grad(&gradients));
    sums.map(|gradient| gradient.sum())
        .reduce(|one, other| one + other)
        .expect("every layer has something that is trained")
}

type Step = Box<dyn Fn() -> Tensor<1>>;

/// Every token through every expert: no framework's user groups tokens by expert for adapters this small.
fn rotmole(device: &Device) -> Step {
    let x = trained([TOKENS, WIDTH], 1.0, device);
    let base = normal([WIDTH, WIDTH], 0.03, device);
    let a = trained([EXPERTS * RANK, WIDTH], 0.03, device);
    let b = trained([EXPERTS * RANK, WIDTH], 0.03, device);
    let router = trained([EXPERTS, WIDTH], 0.03, device);
    let rotation_gate = trained([EXPERTS * RANK / 2, WIDTH], 0.03, device);
    let upstream = normal([TOKENS, WIDTH], 1.0, device);
    Box::new(move || {
        let through = |weight: &Tensor<2>| x.clone().matmul(weight.clone().transpose());
        let (_, gates) = top_k_gates(through(&router));
        let latent: Tensor<4> = through(&a).reshape([TOKENS, EXPERTS, RANK / 2, 2]);
        let angles: Tensor<3> = through(&rotation_gate).reshape([TOKENS, EXPERTS, RANK / 2]);
        let (cosine, sine) = (angles.clone().cos(), angles.sin());
        let first: Tensor<3> = latent.clone().narrow(3, 0, 1).squeeze_dim(3);
        let second: Tensor<3> = latent.narrow(3, 1, 1).squeeze_dim(3);
        let turned_first = first.clone() * cosine.clone() - second.clone() * sine.clone();
        let turned_second = first * sine + second * cosine;
        let turned: Tensor<4> = Tensor::stack(vec![turned_first, turned_second], 3);
        let turned: Tensor<3> = turned.reshape([TOKENS, EXPERTS, RANK]);
        let weighted: Tensor<3> = turned * gates.unsqueeze_dim::<3>(2);
        let output = through(&base) + weighted.reshape([TOKENS, EXPERTS * RANK]).matmul(b.clone());
        let all = [&x, &a, &b, &router, &rotation_gate].map(Tensor::clone);
        gradient_sum(output, &upstream, &all)
    })
}

fn comol(device: &Device) -> Step {
    let x = trained([TOKENS, WIDTH], 1.0, device);
    let base = normal([WIDTH, WIDTH], 0.03, device);
    let a = trained([RANK, WIDTH], 0.03, device);
    let b = trained([RANK, WIDTH], 0.03, device);
    let cores = trained([EXPERTS, RANK * RANK], 0.2, device);
    let router = trained([EXPERTS, RANK], 0.2, device);
    let upstream = normal([TOKENS, WIDTH], 1.0, device);
    Box::new(move || {
        let latent = x.clone().matmul(a.clone().transpose());
        let gates = softmax(latent.clone().matmul(router.clone().transpose()), 1);
        let merged: Tensor<3> = gates.matmul(cores.clone()).reshape([TOKENS, RANK, RANK]);
        let mixed: Tensor<3> = latent.unsqueeze_dim::<3>(1).matmul(merged);
        let base_output = x.clone().matmul(base.clone().transpose());
        let output = base_output + mixed.reshape([TOKENS, RANK]).matmul(b.clone());
        let all = [&x, &a, &b, &router, &cores].map(Tensor::clone);
        gradient_sum(output, &upstream, &all)
    })
}

/// Tokens grouped by expert on the host, which is how it is done where there is no grouped product.
fn latent_moe(device: &Device) -> Step {
    let many = |count: usize, shape: [usize; 2], deviation: f64| -> Vec<Tensor<2>> {
        (0..count)
            .map(|_| trained(shape, deviation, device))
            .collect()
    };
    let x = trained([MOE_TOKENS, HIDDEN], 1.0, device);
    let router = trained([EXPERTS, HIDDEN], 0.03, device);
    let gate_latent = many(GROUPS, [HIDDEN, LATENT], 0.04);
    let up_latent = many(GROUPS, [HIDDEN, LATENT], 0.04);
    let gate_expert = many(EXPERTS, [LATENT, INTERMEDIATE], 0.06);
    let up_expert = many(EXPERTS, [LATENT, INTERMEDIATE], 0.06);
    let down = many(EXPERTS, [INTERMEDIATE, HIDDEN], 0.06);
    let upstream = normal([MOE_TOKENS, HIDDEN], 1.0, device);
    Box::new(move || {
        let device = x.device();
        let (chosen, gates) = top_k_gates(x.clone().matmul(router.clone().transpose()));
        let chosen: Vec<i64> = chosen.into_data().iter::<i64>().collect();
        let latents: Vec<[Tensor<2>; 2]> = gate_latent
            .iter()
            .zip(&up_latent)
            .map(|(gate, up)| [gate, up].map(|weight| x.clone().matmul(weight.clone())))
            .collect();
        let mut output = Tensor::<2>::zeros([MOE_TOKENS, HIDDEN], &device);
        for expert in 0..EXPERTS {
            let takes = |token: &i64| {
                let first = *token as usize * TOP_K;
                chosen[first..first + TOP_K].contains(&(expert as i64))
            };
            let tokens: Vec<i64> = (0..MOE_TOKENS as i64).filter(takes).collect();
            if tokens.is_empty() {
                continue;
            }
            let count = tokens.len();
            let tokens = Tensor::<1, Int>::from_data(TensorData::new(tokens, [count]), &device);
            let [gate, up] = &latents[expert * GROUPS / EXPERTS];
            let of_tokens = |latent: &Tensor<2>| latent.clone().select(0, tokens.clone());
            let gated = silu(of_tokens(gate).matmul(gate_expert[expert].clone()))
                * of_tokens(up).matmul(up_expert[expert].clone());
            let weight = of_tokens(&gates.clone().narrow(1, expert, 1));
            let rows = gated.matmul(down[expert].clone()) * weight;
            output = output.select_assign(0, tokens, rows, IndexingUpdateOp::Add);
        }
        let lists = [&gate_latent, &up_latent, &gate_expert, &up_expert, &down];
        let mut all = vec![x.clone(), router.clone()];
        all.extend(lists.into_iter().flatten().cloned());
        gradient_sum(output, &upstream, &all)
    })
}

fn main() -> Result<(), String> {
    let usage = "usage: rankmix-peer-burn wgpu|flex rotmole|comol|latent_moe";
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [backend, layer] = arguments.as_slice() else {
        return Err(usage.to_owned());
    };
    let device = match backend.as_str() {
        "wgpu" => Device::wgpu(DeviceKind::Cpu),
        "flex" => Device::flex(),
        _ => return Err(usage.to_owned()),
    };
    let device = device.autodiff();
    let step = match layer.as_str() {
        "rotmole" => rotmole(&device),
        "comol" => comol(&device),
        "latent_moe" => latent_moe(&device),
        _ => return Err(usage.to_owned()),
    };
    let mut checksum = 0.0_f32;
    let mut seconds = Vec::new();
    for run in 0..WARM_UP + STEPS {
        let start = Instant::now();
        checksum = step().into_data().iter::<f32>().sum();
        if run >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let bytes = device
        .memory_pool_usage()
        .map_or(0, |usage| usage.bytes_reserved);
    println!("{:.6} {bytes} {checksum:.3}", seconds[STEPS / 2]);
    Ok(())
}
