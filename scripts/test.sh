#!/usr/bin/env bash
# Runs all tests. Where the machine has no Vulkan, Metal or DX12 adapter, it first installs a software Vulkan driver (Debian and
# Ubuntu; elsewhere it says what to install). Closes with the test runner's own summaries.
set -euo pipefail
cd "$(dirname "$0")/.."

# Without a display EGL looks for one for two seconds.
if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then export EGL_PLATFORM="${EGL_PLATFORM:-surfaceless}"; fi

cargo build --release --features cli --bin rankmix

has_adapter() {
  local devices
  devices=$(cargo run --release --quiet --features cli --bin rankmix -- devices 2>/dev/null) || return 1
  grep -qE '\((vulkan|metal|dx12), ' <<<"$devices"
}

if ! has_adapter; then
  echo "test.sh: no adapter found, a software Vulkan driver is needed"
  if command -v apt-get >/dev/null; then
    as_root=""
    if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi
    $as_root apt-get update
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 libegl1
  else
    echo "test.sh: install a software Vulkan driver and run this again:" >&2
    echo "  Fedora  mesa-vulkan-drivers      Arch  vulkan-swrast      Alpine  mesa-vulkan-swrast" >&2
    exit 1
  fi
  if ! has_adapter; then
    echo "test.sh: there is still no adapter; \`rankmix devices\` says:" >&2
    cargo run --release --quiet --features cli --bin rankmix -- devices >&2
    exit 1
  fi
fi

cargo run --release --quiet --features cli --bin rankmix -- devices 2>/dev/null
cargo test --release --all-features "$@"
