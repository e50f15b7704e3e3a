//! Merging an adapter into the weights underneath, and taking it out again.

use crate::error::{Error, Result};
use crate::formats::peft::{ExpertOrientation, FusedExperts, LoraPair, PeftAdapter, Target};
use crate::ops::{Matrix, gemm};
use crate::tensor::Tensor;

/// `weight += factor b a`, or its transpose; a is `[rank, d_in]`, b `[d_out, rank]`.
fn add_product(weight: &mut [f32], a: &Tensor, b: &Tensor, factor: f32, transposed: bool) {
    let (rank, d_in, d_out) = (b.shape().last(), a.shape().last(), b.shape().dims()[0]);
    let (a, b) = (a.to_f32(), b.to_f32());
    let (a, b) = (Matrix::new(&a, rank, d_in), Matrix::new(&b, d_out, rank));
    if transposed {
        let (a, b) = (a.transposed_if(true), b.transposed_if(true));
        gemm(weight, a, b, factor, true, true);
    } else {
        gemm(weight, b, a, factor, true, true);
    }
}

impl LoraPair {
    fn add_to(&self, weight: &Tensor, factor: f64, fan_in_fan_out: bool) -> Result<Tensor> {
        let (d_in, d_out) = (self.a.shape().last(), self.b.shape().dims()[0]);
        // An embedding's weight is [vocabulary, width], what A reads first.
        let transposed = fan_in_fan_out || self.target == Target::Embedding;
        let expected = if transposed {
            [d_in, d_out]
        } else {
            [d_out, d_in]
        };
        if weight.shape().dims() != expected {
            return Err(Error::shape(
                "merge",
                format!(
                    "the weight is {:?}, the adapter is for {expected:?}",
                    weight.shape().dims()
                ),
            ));
        }
        let mut merged = weight.to_f32();
        add_product(&mut merged, &self.a, &self.b, factor as f32, transposed);
        Tensor::f32(expected, merged)
    }

    /// `weight + scale B A`: the weight of a plain layer that computes what the adapted one does. The weight is `[d_out, d_in]`, with
    /// `fan_in_fan_out` and for embeddings transposed. The bias of B is left out; it is to be added to the layer's, times the scale.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weight has other widths.
    pub fn merge(&self, weight: &Tensor, fan_in_fan_out: bool) -> Result<Tensor> {
        self.add_to(weight, self.scale, fan_in_fan_out)
    }

    /// `weight - scale B A`: what was there before [`LoraPair::merge`], up to rounding.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weight has other widths.
    pub fn unmerge(&self, weight: &Tensor, fan_in_fan_out: bool) -> Result<Tensor> {
        self.add_to(weight, -self.scale, fan_in_fan_out)
    }
}

impl FusedExperts {
    fn add_to(&self, weights: &Tensor, factor: f64) -> Result<Tensor> {
        let misfit = || {
            Error::shape(
                "merge",
                format!(
                    "the weights {:?} are not those of the {} experts of the adapter",
                    weights.shape().dims(),
                    self.experts.len()
                ),
            )
        };
        let &[experts, middle, last] = weights.shape().dims() else {
            return Err(misfit());
        };
        let transposed = self.orientation == ExpertOrientation::MiddleIsInput;
        let [d_out, d_in] = if transposed {
            [last, middle]
        } else {
            [middle, last]
        };
        let fit = self
            .experts
            .iter()
            .all(|(a, b)| a.shape().last() == d_in && b.shape().dims()[0] == d_out);
        if experts != self.experts.len() || !fit || middle == 0 || last == 0 {
            return Err(misfit());
        }
        let mut merged = weights.to_f32();
        let each = merged.chunks_exact_mut(middle * last);
        for (weight, (a, b)) in each.zip(&self.experts) {
            add_product(weight, a, b, factor as f32, transposed);
        }
        Tensor::f32([experts, middle, last], merged)
    }

    /// The fused weights `[experts, middle, last]` with every expert's change added.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weights have other extents.
    pub fn merge(&self, weights: &Tensor) -> Result<Tensor> {
        self.add_to(weights, self.scale)
    }

    /// What was there before [`FusedExperts::merge`], up to rounding.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weights have other extents.
    pub fn unmerge(&self, weights: &Tensor) -> Result<Tensor> {
        self.add_to(weights, -self.scale)
    }
}

impl PeftAdapter {
    /// The merged weight of a layer, or `None` if the adapter leaves it alone.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weight has other widths than the pair.
    pub fn merged(&self, layer: &str, weight: &Tensor) -> Result<Option<Tensor>> {
        let pair = self.pairs.get(layer);
        pair.map(|pair| pair.merge(weight, self.config.fan_in_fan_out))
            .transpose()
    }
}
