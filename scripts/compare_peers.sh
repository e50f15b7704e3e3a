#!/usr/bin/env bash
# rankmix against its peers on this machine, forward plus backward, in turns: Burn's wgpu and flex backends, Candle and ndarray on the CPU. Prints
# two tables: seconds (the median over the rounds, of each program's own median) and device memory. Building Burn takes half an hour on 2 cores; it
# all stays in RANKMIX_PEERS (default ~/.cache/rankmix-peers).
#
# usage: scripts/compare_peers.sh [ROUNDS]     3 unless given
set -euo pipefail
cd "$(dirname "$0")/.."

rounds="${1:-3}"
peers="${RANKMIX_PEERS:-$HOME/.cache/rankmix-peers}"
export EGL_PLATFORM="${EGL_PLATFORM:-surfaceless}"

echo "building; the first time takes long" >&2
cargo build --release --quiet --features cli --bin rankmix
for peer in burn cpu; do
  CARGO_TARGET_DIR="$peers/$peer" cargo build --release --quiet --manifest-path "benches/peers/$peer/Cargo.toml"
done
rankmix="${CARGO_TARGET_DIR:-target}/release/rankmix"
burn="$peers/burn/release/rankmix-peer-burn"
cpu="$peers/cpu/release/rankmix-peer-cpu"
results=$(mktemp)
trap 'rm -f "$results"' EXIT

# Both print a line of `LAYER WHERE WHO SECONDS BYTES`. Burn's wgpu backend may crash when it ends, after its figure.
ours() { # layer, device
  "$rankmix" time --layer "$1" --device "$2" --json |
    python3 -c "import json, sys; t = json.load(sys.stdin); print('$1 $2 rankmix', t['step_seconds'], t['peak_bytes'], t['pool_bytes'])" >> "$results"
}
theirs() { # layer, device, name, program and arguments
  local layer=$1 device=$2 name=$3 figures
  shift 3
  figures=$("$@" "$layer" 2>/dev/null) || [ -n "$figures" ]
  awk -v of="$layer $device $name" 'END { print of, $1, $2, 0 }' <<<"$figures" >> "$results"
}

for round in $(seq "$rounds"); do
  echo "round $round of $rounds" >&2
  for layer in rotmole comol latent_moe; do
    ours "$layer" vulkan
    theirs "$layer" vulkan Burn "$burn" wgpu
    ours "$layer" cpu
    theirs "$layer" cpu Burn "$burn" flex
    theirs "$layer" cpu Candle "$cpu" candle
  done
  ours lora cpu
  theirs lora cpu ndarray "$cpu" ndarray
done

"$rankmix" devices | sed -n 1p
python3 - "$results" <<'PYTHON'
import statistics, sys
seconds, memory, pools = {}, {}, {}
for line in open(sys.argv[1]):
    layer, device, who, time, held, pool = line.split()
    seconds.setdefault((layer, device, who), []).append(float(time))
    pools[layer, device, who] = int(pool)
    memory[layer, device, who] = max(int(held), memory.get((layer, device, who), 0))
print("| layer | on | rankmix | peer | | times as fast |\n|---|---|---:|---|---:|---:|")
middle = {key: statistics.median(times) for key, times in seconds.items()}
for (layer, device, who), time in middle.items():
    if who != "rankmix":
        own = middle[layer, device, "rankmix"]
        print(f"| {layer} | {device} | {own * 1e3:.1f} ms | {who} | {time * 1e3:.1f} ms | {time / own:.1f} |")
# Parameters and inputs are the same numbers for both.
print("\n| layer | device memory of rankmix | held by Burn's allocator | share | the same without parameters and inputs | | share |\n|---|---:|---:|---:|---:|---:|---:|")
for (layer, device, who), held in memory.items():
    if who == "Burn" and held:
        own, pool = memory[layer, device, "rankmix"], pools[layer, device, "rankmix"]
        rest = held - (own - pool)
        print(f"| {layer} | {own / 1e6:.1f} MB | {held / 1e6:.1f} MB | {own / held:.2f} | {pool / 1e6:.1f} MB | {rest / 1e6:.1f} MB | {pool / rest:.2f} |")
PYTHON
