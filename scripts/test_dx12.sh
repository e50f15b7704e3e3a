#!/usr/bin/env bash
# test_dx12.sh [FILTER...]: every golden case, in f32 and in f16, trusted and checked, on wgpu's DirectX 12 backend, without Windows and
# without a GPU: the crate is built for x86_64-pc-windows-gnu and runs under Wine with Microsoft's shader compiler FXC (see
# dx12_environment.sh). With filters: those tests of the suite instead, such as `training` or `moe_facts`. Not for every change: FXC
# takes seconds for a kernel. The first run installs everything it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

# build KIND NAME: builds a target of the crate into target/dx12/NAME.exe.
build() {
  local path
  path=$(built_file "$2(-[0-9a-f]+)?\.exe" scripts/cargo_for.sh x86_64-pc-windows-gnu build --release --all-features "--$1" "$2")
  # Wine sees the checkout alone, wherever cargo builds.
  mkdir -p target/dx12
  cp "$path" "target/dx12/$2.exe"
}

# on_dx12 DEVICE RESULT PROGRAM ARGUMENTS...: runs it, and fails if it does, or if it prints no such line of the device that it ran on, or none
# of the result.
on_dx12() {
  local device=$1 result=$2 log begun=$SECONDS
  shift 2
  log=$(mktemp)
  scripts/dx12_environment.sh "$@" 2>&1 | tee "$log" || {
    rm "$log"
    echo "test_dx12.sh: failed: $*" >&2
    return 1
  }
  grep -aqE "$device" "$log" || {
    rm "$log"
    echo "test_dx12.sh: this did not run on DirectX 12: $*" >&2
    return 1
  }
  grep -aqE "$result" "$log" || {
    rm "$log"
    echo "test_dx12.sh: nothing was tested, or not everything: $*" >&2
    return 1
  }
  rm "$log"
  echo "test_dx12.sh: $((SECONDS - begun)) s"
}

failed=0
if [ $# -gt 0 ]; then
  build test suite
  for filter in "$@"; do
    # The suite's golden cases and other tests of the DirectX 12 device; the CPU's and GL's run elsewhere.
    on_dx12 '^device dx12: [^n]' '^test result: ok\. [1-9][0-9]* passed; 0 failed; 0 ignored;' \
      target/dx12/suite.exe "$filter" --skip ::cpu --skip ::gl || failed=1
  done
else
  build bin rankmix
  for mode in "" --checked "--storage f16" "--storage f16 --checked"; do
    echo "== golden cases ${mode:-trusted}"
    # shellcheck disable=SC2086
    on_dx12 '^device: .*\(dx12, ' '  ok  output ' target/dx12/rankmix.exe replay $mode tests/golden/*.safetensors || failed=1
  done
fi
exit $failed
