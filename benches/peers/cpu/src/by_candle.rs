//! The layers on Candle's tensors, gradients by its autograd.

use candle_core::{D, Device, Result, Tensor, Var};

use crate::{RANK, Step, TOKENS, WIDTH};

const EXPERTS: usize = 8;
const TOP_K: usize = 2;

const MOE_TOKENS: usize = 256;
const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 256;
const LATENT: usize = 256;
const GROUPS: usize = 2;

fn normal<const N: usize>(shape: [usize; N], deviation: f32) -> Result<Tensor> {
    Tensor::randn(0.0, deviation, shape.as_slice(), &Device::Cpu)
}

fn trained<const N: usize>(shape: [usize; N], deviation: f32) -> Result<Var> {
    Var::from_tensor(&normal(shape, deviation)?)
}

fn softmax(logits: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(D::Minus1)?.detach();
    let powers = logits.broadcast_sub(&largest)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// The experts of each token, and the softmax over their logits, zero for those not chosen. By a mask: Candle 0.11.1 has no gradient for
/// `scatter_add` where the source is narrower than the target.
fn top_k_gates(logits: &Tensor) -> Result<(Tensor, Tensor)> {
    let order = logits.detach().contiguous()?.arg_sort_last_dim(false)?;
    let chosen = order.narrow(1, 0, TOP_K)?.contiguous()?;
    let experts = Tensor::arange(0, EXPERTS as u32, &Device::Cpu)?.reshape((1, EXPERTS))?;
    let mut mask = logits.zeros_like()?.detach();
    for slot in 0..TOP_K {
        let is_chosen = chosen.narrow(1, slot, 1)?.broadcast_eq(&experts)?;
        mask = (mask + is_chosen.to_dtype(logits.dtype())?)?;
    }
    let gates = softmax(&(logits + mask.affine(1e30, -1e30)?)?)?;
    Ok((chosen, gates))
}

/// The sum of the gradients of all these, after a backward pass from `output` under `upstream`.
fn gradient_sum(output: &Tensor, upstream: &Tensor, trained: &[&Var]) -> Result<f32> {
    let gradients = (output * upstream)?.sum_all()?.backward()?;
    let mut sum = 0.0;
    for variable in trained {
        if let Some(gradient) = gradients.get(variable.as_tensor()) {
            sum += gradient.sum_all()?.to_scalar::<f32>()?;
        }
    }
    Ok(sum)
}

pub(crate) fn rotmole() -> Result<Step> {
    let x = trained([TOKENS, WIDTH], 1.0)?;
    let base = normal([WIDTH, WIDTH], 0.03)?;
    let a = trained([EXPERTS * RANK, WIDTH], 0.03)?;
    let b = trained([EXPERTS * RANK, WIDTH], 0.03)?;
    let router = trained([EXPERTS, WIDTH], 0.03)?;
    let rotation_gate = trained([EXPERTS * RANK / 2, WIDTH], 0.03)?;
    let upstream = normal([TOKENS, WIDTH], 1.0)?;
    Ok(Box::new(move || {
        let through = |weight: &Tensor| x.matmul(&weight.t()?);
        let (_, gates) = top_k_gates(&through(&router)?)?;
        let latent = through(&a)?.reshape((TOKENS, EXPERTS, RANK / 2, 2))?;
        let angles = through(&rotation_gate)?.reshape((TOKENS, EXPERTS, RANK / 2))?;
        let (cosine, sine) = (angles.cos()?, angles.sin()?);
        let half = |which: usize| latent.narrow(3, which, 1)?.squeeze(3);
        let (first, second) = (half(0)?, half(1)?);
        let turned_first = ((&first * &cosine)? - (&second * &sine)?)?;
        let turned_second = ((&first * &sine)? + (&second * &cosine)?)?;
        let turned = Tensor::stack(&[turned_first, turned_second], 3)?;
        let turned = turned.reshape((TOKENS, EXPERTS, RANK))?;
        let weighted = turned.broadcast_mul(&gates.unsqueeze(2)?)?;
        let adapted = weighted.reshape((TOKENS, EXPERTS * RANK))?.matmul(&b)?;
        let output = (through(&base)? + adapted)?;
        Ok(gradient_sum(
            &output,
            &upstream,
            &[&x, &a, &b, &router, &rotation_gate],
        )?)
    }))
}

pub(crate) fn comol() -> Result<Step> {
    let x = trained([TOKENS, WIDTH], 1.0)?;
    let base = normal([WIDTH, WIDTH], 0.03)?;
    let a = trained([RANK, WIDTH], 0.03)?;
    let b = trained([RANK, WIDTH], 0.03)?;
    let cores = trained([EXPERTS, RANK * RANK], 0.2)?;
    let router = trained([EXPERTS, RANK], 0.2)?;
    let upstream = normal([TOKENS, WIDTH], 1.0)?;
    Ok(Box::new(move || {
        let latent = x.matmul(&a.t()?)?;
        let gates = softmax(&latent.matmul(&router.t()?)?)?;
        let merged = gates.matmul(&cores)?.reshape((TOKENS, RANK, RANK))?;
        let mixed = latent.unsqueeze(1)?.matmul(&merged)?.squeeze(1)?;
        let output = (x.matmul(&base.t()?)? + mixed.matmul(&b)?)?;
        Ok(gradient_sum(
            &output,
            &upstream,
            &[&x, &a, &b, &router, &cores],
        )?)
    }))
}

/// Tokens grouped by expert on the host, which is how it is done where there is no grouped product.
pub(crate) fn latent_moe() -> Result<Step> {
    let many = |count: usize, shape: [usize; 2], deviation: f32| -> Result<Vec<Var>> {
        (0..count).map(|_| trained(shape, deviation)).collect()
    };
    let x = trained([MOE_TOKENS, HIDDEN], 1.0)?;
    let router = trained([EXPERTS, HIDDEN], 0.03)?;
    let gate_latent = many(GROUPS, [HIDDEN, LATENT], 0.04)?;
    let up_latent = many(GROUPS, [HIDDEN, LATENT], 0.04)?;
    let gate_expert = many(EXPERTS, [LATENT, INTERMEDIATE], 0.06)?;
    let up_expert = many(EXPERTS, [LATENT, INTERMEDIATE], 0.06)?;
    let down = many(EXPERTS, [INTERMEDIATE, HIDDEN], 0.06)?;
    let upstream = normal([MOE_TOKENS, HIDDEN], 1.0)?;
    Ok(Box::new(move || {
        let (chosen, gates) = top_k_gates(&x.matmul(&router.t()?)?)?;
        let chosen = chosen.to_vec2::<u32>()?;
        let latents = gate_latent
            .iter()
            .zip(&up_latent)
            .map(|(gate, up)| Ok([x.matmul(gate)?, x.matmul(up)?]))
            .collect::<Result<Vec<_>>>()?;
        let mut output = Tensor::zeros((MOE_TOKENS, HIDDEN), x.dtype(), &Device::Cpu)?;
        for expert in 0..EXPERTS {
            let takes = |token: &u32| chosen[*token as usize].contains(&(expert as u32));
            let tokens: Vec<u32> = (0..MOE_TOKENS as u32).filter(takes).collect();
            if tokens.is_empty() {
                continue;
            }
            let count = tokens.len();
            let tokens = Tensor::from_vec(tokens, count, &Device::Cpu)?;
            let [gate, up] = &latents[expert * GROUPS / EXPERTS];
            let of_tokens = |latent: &Tensor| latent.index_select(&tokens, 0);
            let gated = of_tokens(gate)?.matmul(&gate_expert[expert])?.silu()?;
            let hidden = (gated * of_tokens(up)?.matmul(&up_expert[expert])?)?;
            let weight = of_tokens(&gates.narrow(1, expert, 1)?.contiguous()?)?;
            let rows = hidden.matmul(&down[expert])?.broadcast_mul(&weight)?;
            output = output.index_add(&tokens, &rows, 0)?;
        }
        let lists = [&gate_latent, &up_latent, &gate_expert, &up_expert, &down];
        let mut all = vec![&x, &router];
        all.extend(lists.into_iter().flatten());
        Ok(gradient_sum(&output, &upstream, &all)?)
    }))
}
