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
trap 'rm -rf "$seeds" /dev/shm/rankmix-fuzz-*' EXIT
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
