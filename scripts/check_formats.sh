#!/usr/bin/env bash
# Files that rankmix writes, read by the packages that define the formats, and theirs read by rankmix: Python's safetensors, gguf and, where it can
# be installed, peft, whose own adapters are merged as it does. Needs the network once; what it fetches stays in RANKMIX_TOOLS (default ~/.cache/rankmix-tools).
#
# usage: scripts/check_formats.sh [--peft]     --peft: with torch and peft too, 1.5 GB
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(numpy safetensors gguf)
case "${1:-}" in
  "") ;;
  --peft) packages+=(torch peft) ;;
  *) echo "usage: check_formats.sh [--peft]" >&2; exit 2 ;;
esac
tools="${RANKMIX_TOOLS:-$HOME/.cache/rankmix-tools}/formats"
if [ ! -x "$tools/bin/python" ]; then python3 -m venv "$tools"; fi
"$tools/bin/pip" install --quiet "${packages[@]}"

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export EGL_PLATFORM="${EGL_PLATFORM:-surfaceless}"
cargo run --release --quiet --example formats -- "$out"
"$tools/bin/python" scripts/formats/check.py write "$out/theirs" "${1:-}"
cargo build --release --quiet --features cli --bin rankmix
RANKMIX_THEIR_FILES="$out/theirs" cargo test --release --quiet --all-features --test formats -- --ignored theirs
if [ "${1:-}" = --peft ]; then
  for name in wrapped bias; do
    theirs="$out/theirs/$name"
    cargo run --release --quiet --features cli --bin rankmix -- convert merge-lora "$theirs/model" "$theirs/adapter" "$theirs/merged"
    "$tools/bin/python" scripts/formats/check.py merged "$theirs"
  done
fi
"$tools/bin/python" scripts/formats/check.py read "$out" "${1:-}"
echo "check_formats.sh: all agree"
