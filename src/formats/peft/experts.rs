//! Adapters of expert weights that are fused into one tensor (`target_parameters`).

use crate::error::{Error, Result};
use crate::formats::peft::{LoraConfig, LoraPair, Target};
use crate::tensor::Tensor;

/// Which of the fused tensor's two widths A reads: releases of PEFT differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertOrientation {
    /// A reads the last extent of `[experts, d_out, d_in]`: the change of an expert's weight is B A.
    LastIsInput,
    /// A reads the extent in the middle: the change is (B A)ᵀ.
    MiddleIsInput,
}

impl ExpertOrientation {
    /// Which width A of a pair reads by the widths of the fused tensor, `[experts, middle, last]`; the last if both are equal, `None` if the pair does not
    /// fit either way.
    #[must_use]
    pub fn of(pair: &LoraPair, extents: [usize; 3]) -> Option<Self> {
        [Self::LastIsInput, Self::MiddleIsInput]
            .into_iter()
            .find(|orientation| orientation.fits(pair, extents))
    }

    fn fits(self, pair: &LoraPair, [experts, middle, last]: [usize; 3]) -> bool {
        let (&[ranks, d_in], &[d_out, columns]) = (pair.a.shape().dims(), pair.b.shape().dims())
        else {
            return false;
        };
        let widths = match self {
            Self::LastIsInput => [last, middle],
            Self::MiddleIsInput => [middle, last],
        };
        [d_in, d_out] == widths
            && ranks == columns
            && ![experts, middle, last, ranks].contains(&0)
            && ranks.is_multiple_of(experts)
    }
}

/// The matrices of every expert, as one adapter of the fused tensor holds them: in A `[experts * rank, d_in]` expert e has the rows e rank + j, in B `[d_out,
/// rank * experts]` the columns j experts + e.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedExperts {
    /// A `[rank, d_in]` and B `[d_out, rank]` of each expert.
    pub experts: Vec<(Tensor, Tensor)>,
    /// Which width A reads.
    pub orientation: ExpertOrientation,
    /// The factor in front of B A.
    pub scale: f64,
}

impl FusedExperts {
    /// Takes a pair apart, for a model whose fused tensor is `[experts, middle, last]`. If both widths are equal the file does not say how it
    /// lies: then A is taken to read the last. Newer releases of PEFT write it so for most models, and the other way for those whose experts lie transposed; a caller who knows
    /// takes [`FusedExperts::of_oriented_pair`].
    ///
    /// # Errors
    /// [`Error::Shape`] if the pair does not fit the fused tensor.
    pub fn of_pair(pair: &LoraPair, extents: [usize; 3]) -> Result<Self> {
        let orientation = ExpertOrientation::of(pair, extents);
        Self::of_oriented_pair(
            pair,
            extents,
            orientation.unwrap_or(ExpertOrientation::LastIsInput),
        )
    }

    /// The same where it is known which width A reads.
    ///
    /// # Errors
    /// [`Error::Shape`] if the pair does not fit the fused tensor so.
    pub fn of_oriented_pair(
        pair: &LoraPair,
        [experts, middle, last]: [usize; 3],
        orientation: ExpertOrientation,
    ) -> Result<Self> {
        let (a, b) = (pair.a.shape().dims(), pair.b.shape().dims());
        if !orientation.fits(pair, [experts, middle, last]) {
            return Err(Error::shape(
                "fused experts",
                format!(
                    "lora_A {a:?} and lora_B {b:?} do not fit the weights [{experts}, {middle}, {last}]"
                ),
            ));
        }
        let (ranks, d_in, d_out) = (a[0], a[1], b[0]);
        let rank = ranks / experts;
        let (a, b) = (pair.a.to_f32(), pair.b.to_f32());
        let matrices = (0..experts)
            .map(|expert| {
                let rows = a[expert * rank * d_in..(expert + 1) * rank * d_in].to_vec();
                let columns = (0..d_out).flat_map(|row| {
                    let start = row * ranks + expert;
                    (0..rank).map(move |j| start + j * experts)
                });
                let columns = columns.map(|at| b[at]).collect();
                Ok((
                    Tensor::f32([rank, d_in], rows)?,
                    Tensor::f32([d_out, rank], columns)?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            experts: matrices,
            orientation,
            scale: pair.scale,
        })
    }

    /// The pair that PEFT keeps.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no expert, or one has other widths or another rank than the first.
    pub fn to_pair(&self) -> Result<LoraPair> {
        let misfit = || Error::shape("fused experts", "the experts' matrices are not alike");
        let (a, b) = self.experts.first().ok_or_else(misfit)?;
        let (&[rank, d_in], &[d_out, _]) = (a.shape().dims(), b.shape().dims()) else {
            return Err(misfit());
        };
        let experts = self.experts.len();
        let mut all_a = Vec::with_capacity(experts * rank * d_in);
        let mut all_b = vec![0.0; d_out * rank * experts];
        for (expert, (a, b)) in self.experts.iter().enumerate() {
            if a.shape().dims() != [rank, d_in] || b.shape().dims() != [d_out, rank] {
                return Err(misfit());
            }
            all_a.extend(a.to_f32());
            for (at, value) in b.to_f32().into_iter().enumerate() {
                let (row, j) = (at / rank, at % rank);
                all_b[row * rank * experts + j * experts + expert] = value;
            }
        }
        Ok(LoraPair {
            target: Target::Linear,
            a: Tensor::f32([experts * rank, d_in], all_a)?,
            b: Tensor::f32([d_out, rank * experts], all_b)?,
            bias: None,
            scale: self.scale,
        })
    }
}

impl LoraConfig {
    /// Whether the adapter has matrices of fused expert weights.
    #[must_use]
    pub fn has_fused_experts(&self) -> bool {
        let parameters = self.others.get("target_parameters");
        parameters.is_some_and(|value| value.as_array().is_some_and(|names| !names.is_empty()))
    }
}
