//! Making one kind of mixture out of another: an MoE into latent experts, LoRAs into core experts, a dense feed-forward into an MoE.
