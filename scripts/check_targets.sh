#!/usr/bin/env bash
# check_targets.sh [TARGET...]: type-checks the crate, its program, its tests, benches and examples for targets that this machine cannot
# run: our code that is compiled only there, and wgpu's backend against the system's interfaces. Nothing is linked or run, and no
# kernel is compiled. Lints too, where the toolchain has the target's standard library.
#
# TARGET: apple (aarch64-apple-darwin, Metal), windows (x86_64-pc-windows-gnu, DirectX 12), wasm (wasm32-unknown-unknown, WebGPU; the
# library alone). Without targets: apple and windows.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

fail() {
  echo "check_targets.sh: $*" >&2
  exit 1
}

# A benchmark library has a line of C. There is no compiler of C for Apple here, and nothing is linked: empty files will do.
stub=$(mktemp -d)
trap 'rm -rf "$stub"' EXIT
cat >"$stub/cc" <<'STUB'
#!/bin/sh
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : >"$2"; fi
  shift
done
STUB
# shellcheck disable=SC2016
printf '#!/bin/sh\n: >"$2"\n' >"$stub/ar"
chmod +x "$stub/cc" "$stub/ar"
export CC_aarch64_apple_darwin=$stub/cc AR_aarch64_apple_darwin=$stub/ar

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
  if [ "$name" = windows ] && ! command -v x86_64-w64-mingw32-gcc >/dev/null; then install_packages gcc-mingw-w64-x86-64; fi
  begun=$SECONDS
  scripts/cargo_for.sh "$target" check --release "${parts[@]}" || fail "$target: does not type-check"
  checked="type-checked"
  installed=
  if command -v rustup >/dev/null; then installed=$(rustup target list --installed); fi
  # Not through a pipe: grep leaves at the first line that fits, and rustup would fail.
  if grep -qx "$target" <<<"$installed"; then
    cargo clippy --quiet --release --target "$target" "${parts[@]}" -- -D warnings || fail "$target: has lints"
    checked="type-checked and linted"
  fi
  echo "check_targets.sh: $target $checked in $((SECONDS - begun)) s ($version, ${parts[*]})"
done
