//! Making one kind of mixture out of another: an MoE into latent experts, LoRAs into core experts, a dense feed-forward into an MoE; and
//! merging a LoRA.

mod calibration;
mod clusters;
mod core;
mod dense;
mod dense_config;
mod dense_model;
mod dense_source;
mod fingerprint;
mod gaussian;
mod grouping;
mod latent;
mod latent_report;
mod merge;
mod model;
mod model_report;
mod plan;
mod source;
mod stack;
mod stage;
mod subspace;

pub use self::core::{
    CoreExpertReport, CoreLayerReport, CoreReport, CoreRouter, DistillOptions, LoraOptions,
    check_comol_folder, loras_to_comol, moe_lora_to_comol, write_comol,
};
pub use calibration::Calibration;
pub use dense::{
    DenseFeedForward, DenseGates, DenseOptions, DenseReport, KeptOutput, normed_inputs, split_dense,
};
pub use dense_model::{DenseLayerReport, DenseModelOptions, DenseModelReport, convert_dense_model};
pub use latent::{GroupBy, LatentOptions, SvdMethod, SvdOptions, SvdPrecision, convert_layer};
pub use latent_report::{
    ActiveCost, LayerReport, Operator, OperatorReport, Parameters, PhaseErrors, RelativeError,
};
pub use merge::{MergeOptions, MergeReport, MergedTensor, merge_lora};
pub use model::{Listener, ModelOptions, Progress, convert_model};
pub use model_report::{ConvertedLayer, ModelReport, RunFacts, Totals};
