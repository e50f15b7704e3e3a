#!/usr/bin/env bash
# check_targets.sh [TARGET...]: type-checks the crate, its program, its tests, benches and examples for targets that this machine cannot
# run: our code that is compiled only there, and wgpu's backend against the system's interfaces. Nothing is linked or run, and no
# kernel is compiled. Lints too, where the toolchain has the target's standard library.
#
# TARGET: apple (aarch64-apple-darwin, Metal), windows (x86_64-pc-windows-gnu, DirectX 12), wasm (wasm32-unknown-unknown, WebGPU; the
# library alone). Without targets: apple and windows.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "check_targets.sh: $*" >&2
  exit 1
}

if [ $# -eq 0 ]; then set -- apple windows; fi
for name in "$@"; do
  parts=(--all-targets --all-features)
  # The package through which wgpu reaches the system's graphics: without it the backend would not be part of the check.
  case $name in
    apple) target=aarch64-apple-darwin backend=objc2-metal ;;
    windows) target=x86_64-pc-windows-gnu backend=windows ;;
    wasm) target=wasm32-unknown-unknown backend=web-sys parts=(--lib) ;;
    *) fail "there is no target \`$name\`; there are: apple, windows, wasm" ;;
  esac
  packages=$(cargo tree --quiet --target "$target" --edges normal --prefix none)
  version=$(grep -m1 -oE "^$backend v[^ ]+" <<<"$packages") ||
    fail "$target: wgpu is built without \`$backend\`, so its backend would not be checked"
  begun=$SECONDS
  scripts/cargo_for.sh "$target" check --release "${parts[@]}" || fail "$target: does not type-check"
  checked="type-checked"
  if command -v rustup >/dev/null && rustup target list --installed | grep -qx "$target"; then
    cargo clippy --quiet --release --target "$target" "${parts[@]}" -- -D warnings || fail "$target: has lints"
    checked="type-checked and linted"
  fi
  echo "check_targets.sh: $target $checked in $((SECONDS - begun)) s ($version, ${parts[*]})"
done
