//! Layers of a checkpoint as layers of this crate.

use crate::error::{Error, Result};
use crate::formats::LatentDown;
use crate::formats::moe::model::MoeModel;
use crate::formats::moe::scan::MoeLayer;
use crate::graph::ParameterStore;
use crate::layers::{LatentMoe, Moe, Routing};
use crate::tensor::Tensor;

/// The outermost slices of a tensor in another order.
fn permuted(tensor: &Tensor, order: &[usize]) -> Result<Tensor> {
    let elements = tensor.to_f32();
    let each = elements.len() / order.len().max(1);
    let mut moved = Vec::with_capacity(elements.len());
    for &from in order {
        moved.extend_from_slice(&elements[from * each..(from + 1) * each]);
    }
    Tensor::f32(tensor.shape(), moved)
}

/// Biases beside a router that change what it chooses and are not known.
const OTHER_BIASES: [&str; 2] = ["gate.bias", "e_score_correction_bias"];

impl MoeModel {
    /// How the tokens of a layer find their experts.
    fn routing(&self, layer: &MoeLayer) -> Result<Routing> {
        for bias in OTHER_BIASES {
            let name = format!("{}.{bias}", layer.path);
            if self.checkpoint().entry(&name).is_some() {
                let reason = "a router with such a bias is not computed";
                return Err(self.checkpoint().wrong(&name, reason));
            }
        }
        self.config().routing(layer.experts, layer.router_bias)
    }

    /// Puts a layer's parameters into a store under the names that a [`Moe`] called `name` has, and returns that layer: it computes what the
    /// checkpoint's does. It is trainable, as any new layer.
    ///
    /// # Errors
    /// As [`MoeConfig::routing`](crate::formats::MoeConfig::routing) and [`MoeModel::experts`]; [`Error::TypeMismatch`] if the store
    /// has another shape under such a name, [`Error::OutOfMemory`] if the device is full.
    pub fn load_moe(&self, layer: &MoeLayer, store: &ParameterStore, name: &str) -> Result<Moe> {
        let routing = self.routing(layer)?;
        let mut moe = Moe::new(name, self.feed_forward(layer)?, routing)?;
        if let Some(shared) = layer.shared {
            moe = moe.with_shared(shared)?;
        }
        let experts = self.experts(layer)?;
        for (part, tensor) in [
            ("gate", &experts.gate),
            ("up", &experts.up),
            ("down", &experts.down),
        ] {
            store.insert(&format!("{name}.{part}"), tensor)?;
        }
        self.load_others(layer, store, name, None)?;
        Ok(moe)
    }

    /// The same for latent experts and a [`LatentMoe`], whose groups are of consecutive experts: experts, router and bias are put into the order
    /// of the groups, by which the layer's expert i is the checkpoint's `members().concat()[i]`.
    ///
    /// # Errors
    /// As [`MoeModel::load_moe`]; [`Error::Setting`] if the layer's experts are not latent.
    pub fn load_latent_moe(
        &self,
        layer: &MoeLayer,
        store: &ParameterStore,
        name: &str,
    ) -> Result<LatentMoe> {
        let Some(latent) = &layer.latent else {
            return Err(Error::setting(
                "experts",
                &layer.path,
                "they are not latent",
            ));
        };
        let routing = self.routing(layer)?;
        let expert = self.feed_forward(layer)?;
        let mut moe = LatentMoe::new(name, expert, latent.latent, latent.groups, routing)?;
        if let Some(shared) = layer.shared {
            moe = moe.with_shared(shared)?;
        }
        let experts = self.latent_experts(layer)?;
        let order = experts.members().concat();
        let put = |part: &str, tensor: &Tensor| store.insert(&format!("{name}.{part}"), tensor);
        put("gate_latent", &experts.gate_latent)?;
        put("up_latent", &experts.up_latent)?;
        put("gate_expert", &permuted(&experts.gate_expert, &order)?)?;
        put("up_expert", &permuted(&experts.up_expert, &order)?)?;
        match &experts.down {
            LatentDown::Whole(down) => put("down", &permuted(down, &order)?)?,
            LatentDown::Factored { latent, expert } => {
                moe = moe.with_factored_down();
                put("down_latent", latent)?;
                put("down_expert", &permuted(expert, &order)?)?;
            }
        }
        self.load_others(layer, store, name, Some(&order))?;
        Ok(moe)
    }

    /// Router, bias and shared expert.
    fn load_others(
        &self,
        layer: &MoeLayer,
        store: &ParameterStore,
        name: &str,
        order: Option<&[usize]>,
    ) -> Result<()> {
        let ordered = |tensor: Tensor| match order {
            Some(order) => permuted(&tensor, order),
            None => Ok(tensor),
        };
        let put = |part: &str, tensor: &Tensor| store.insert(&format!("{name}.{part}"), tensor);
        put("router", &ordered(self.router(layer)?)?)?;
        if let Some(bias) = self.router_bias(layer)? {
            put("router_bias", &ordered(bias)?)?;
        }
        if let Some(shared) = self.shared(layer)? {
            put("shared_gate", &shared.gate)?;
            put("shared_up", &shared.up)?;
            put("shared_down", &shared.down)?;
            if let Some(gate) = &shared.sigmoid_gate {
                put("shared_expert_gate", gate)?;
            }
        }
        Ok(())
    }
}
