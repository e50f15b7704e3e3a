// What can be trained, in the order of every picture.

/** The adapters, by the names that the package has for them. */
export const ADAPTERS = ["lora", "moe_lora", "rotmole"];

/** What they and the base are called on the page. */
export const LABELS = { base: "Base", lora: "LoRA", moe_lora: "MoE-LoRA", rotmole: "RotMoLE" };
