#!/usr/bin/env bash
# test_dx12.sh [FILTER...]: every golden case, in f32 and in f16, trusted and checked, on wgpu's DirectX 12 backend, without Windows and
# without a GPU: the crate is built for x86_64-pc-windows-gnu and runs under Wine with Microsoft's shader compiler FXC (see
# dx12_environment.sh). With filters: those tests of the suite instead, such as `training` or `moe_facts`. Not for every change: FXC
# takes seconds for a kernel. The first run installs everything it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

# built KIND NAME: builds a target of the crate, and says where it is.
built() {
  local path
  path=$(scripts/cargo_for.sh x86_64-pc-windows-gnu build --release --all-features "--$1" "$2" --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\.exe\)".*/\1/p' | tail -n 1)
  [ -n "$path" ] || {
    echo "test_dx12.sh: cargo built no $2" >&2
    exit 1
  }
  # Wine sees the checkout alone, wherever cargo builds.
  mkdir -p target/dx12
  cp "$path" "target/dx12/$2.exe"
  echo "target/dx12/$2.exe"
}

# on_dx12 EXPECTED PROGRAM ARGUMENTS...: runs it, and fails if it does, or if it does not say that it ran on DirectX 12.
on_dx12() {
  local expected=$1 log begun=$SECONDS
  shift
  log=$(mktemp)
  scripts/dx12_environment.sh "$@" 2>&1 | tee "$log" || {
    rm "$log"
    echo "test_dx12.sh: failed: $*" >&2
    return 1
  }
  grep -aqE "$expected" "$log" || {
    rm "$log"
    echo "test_dx12.sh: this did not run on DirectX 12: $*" >&2
    return 1
  }
  rm "$log"
  echo "test_dx12.sh: $((SECONDS - begun)) s"
}

failed=0
if [ $# -gt 0 ]; then
  program=$(built test suite)
  for filter in "$@"; do
    # The suite's golden cases and other tests of the DirectX 12 device; the CPU's and GL's run elsewhere.
    on_dx12 '^device dx12: [^n]' "$program" "$filter" --skip ::cpu --skip ::gl || failed=1
  done
else
  program=$(built bin rankmix)
  for mode in "" --checked "--storage f16" "--storage f16 --checked"; do
    echo "== golden cases ${mode:-trusted}"
    # shellcheck disable=SC2086
    on_dx12 '^device: .*\(dx12, ' "$program" replay $mode tests/golden/*.safetensors || failed=1
  done
fi
exit $failed
