#!/usr/bin/env bash
# Damaged files for every reader: libFuzzer with the address sanitizer, from files that the example `formats` writes. A panic, a bad access, or an
# allocation of more than 256 MB in one piece ends it with the file that did it. Needs the network once: a nightly compiler and cargo-fuzz.
#
# usage: scripts/fuzz.sh [SECONDS [TARGET...]]     60 seconds a target and all targets unless given
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

seconds="${1:-60}"
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  for file in fuzz/targets/*.rs; do
    name=$(basename "$file" .rs)
    if [ "$name" != files ]; then targets+=("$name"); fi
  done
fi

rustup toolchain list | grep -q ^nightly || rustup toolchain install nightly --profile minimal >&2
install_fuzz() { cargo install --quiet --root "$RANKMIX_TOOLS/cargo-fuzz" cargo-fuzz; }
once "$RANKMIX_TOOLS/cargo-fuzz" install_fuzz
export PATH="$RANKMIX_TOOLS/cargo-fuzz/bin:$PATH"

# What is found stays from run to run.
corpus="$RANKMIX_TOOLS/fuzz/corpus"
seeds=$(mktemp -d)
# In memory where the machine has such a file system: every input is a file or more.
memory=/dev/shm
if [ ! -d "$memory" ]; then memory=${TMPDIR:-/tmp}; fi
RANKMIX_FUZZ_FILES=$(mktemp -d "$memory/rankmix-fuzz.XXXXXX")
export RANKMIX_FUZZ_FILES
trap 'rm -rf "$seeds" "$RANKMIX_FUZZ_FILES"' EXIT
cargo run --release --quiet --example formats -- "$seeds/formats" >&2
seed() { # target, pattern: the example's files of that name, numbered
  local number=0 file
  mkdir -p "$corpus/$1" "$seeds/$1"
  while IFS= read -r file; do
    cp "$file" "$seeds/$1/$((number += 1))"
  done < <(find "$seeds/formats" -name "$2" -size -64k | sort)
}
seed safetensors '*.safetensors'
seed gguf '*.gguf'
seed adapter_config 'adapter_config.json'
seed adapter 'adapter_config.json'
mkdir -p "$corpus/safetensors_index" "$seeds/safetensors_index"
printf '{"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}' > "$seeds/safetensors_index/1"

mkdir -p "$corpus/moe_model" "$seeds/moe_model"
model() { # config.json, then names and shapes
  local config=$1
  shift
  printf '%s\0' "$config"
  printf 'model.layers.0.mlp.%s\n' "$@"
}
config='{"model_type":"qwen3_moe","num_experts_per_tok":1,"norm_topk_prob":true,"hidden_act":"silu","num_hidden_layers":1'
model "$config}" "gate.weight 2 4" experts.{0,1}".gate_proj.weight 3 4" experts.{0,1}".up_proj.weight 3 4" experts.{0,1}".down_proj.weight 4 3" \
  > "$seeds/moe_model/1"
model "$config}" "gate.weight 2 4" "experts.gate_up_proj 2 6 4" "experts.down_proj 2 4 3" "shared_expert_gate.weight 1 4" \
  "shared_expert.gate_proj.weight 2 4" "shared_expert.up_proj.weight 2 4" "shared_expert.down_proj.weight 4 2" > "$seeds/moe_model/2"
model "$config"',"rankmix_latent_moe":{"format_version":1,"groups":1,"latent":2,"factored_down":false,"expert_to_group":{"model.layers.0.mlp":[0,0]}}}' \
  "gate.weight 2 4" "groups.0.gate_latent.weight 2 4" "groups.0.up_latent.weight 2 4" experts.{0,1}".gate_expert.weight 3 2" \
  experts.{0,1}".up_expert.weight 3 2" experts.{0,1}".down.weight 4 3" > "$seeds/moe_model/3"

# Before any of them runs: what does not compile has not found anything.
for target in "${targets[@]}"; do
  cargo +nightly fuzz build --fuzz-dir fuzz --target-dir "$RANKMIX_TOOLS/fuzz/target" "$target" > "$seeds/log" 2>&1 || {
    tail -n 60 "$seeds/log" >&2
    echo "fuzz.sh: $target could not be built" >&2
    exit 2
  }
done
for target in "${targets[@]}"; do
  echo "== $target, $seconds seconds ==" >&2
  if ! cargo +nightly fuzz run --fuzz-dir fuzz --target-dir "$RANKMIX_TOOLS/fuzz/target" "$target" "$corpus/$target" "$seeds/$target" -- \
    -max_total_time="$seconds" -max_len=65536 -malloc_limit_mb=256 -rss_limit_mb=1024 -timeout=10 -print_final_stats=1 > "$seeds/log" 2>&1; then
    tail -n 60 "$seeds/log" >&2
    echo "fuzz.sh: $target found something" >&2
    exit 1
  fi
  grep -E "^stat::(number_of_executed_units|new_units_added|peak_rss_mb)" "$seeds/log"
done
echo "fuzz.sh: nothing found"
