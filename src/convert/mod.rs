//! Making one kind of mixture out of another: an MoE into latent experts, LoRAs into core experts, a dense feed-forward into an MoE.

mod calibration;
mod clusters;
mod dense;
mod gaussian;
mod grouping;
mod latent;
mod latent_report;
mod stack;
mod subspace;

pub use calibration::Calibration;
pub use dense::{
    DenseFeedForward, DenseGates, DenseOptions, DenseReport, KeptOutput, normed_inputs, split_dense,
};
pub use latent::{GroupBy, LatentOptions, SvdMethod, SvdOptions, SvdPrecision, convert_layer};
pub use latent_report::{
    ActiveCost, LayerReport, Operator, OperatorReport, Parameters, PhaseErrors, RelativeError,
};
