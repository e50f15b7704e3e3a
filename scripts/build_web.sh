#!/usr/bin/env bash
# build_web.sh [FOLDER]: the web page with its WebAssembly, ready to be served, in FOLDER [target/page]. Needs Rust; the wasm32
# target and wasm-bindgen are installed where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

page=${1:-target/page}

# The glue between WebAssembly and JavaScript is written by the program whose version is that of the library linked in.
version=$(sed -n '/^name = "wasm-bindgen"$/{n;s/^version = "\(.*\)"$/\1/p;}' Cargo.lock)
glue=$RANKMIX_TOOLS/wasm-bindgen-$version
if [ ! -x "$glue/bin/wasm-bindgen" ]; then
  echo "installing wasm-bindgen-cli $version into $glue" >&2
  cargo install --quiet --version "$version" --root "$glue" wasm-bindgen-cli
fi

# Cargo says where the file went: cargo_for.sh may use a target folder of its own.
messages=$(scripts/cargo_for.sh wasm32-unknown-unknown build --profile web --package rankmix-web --lib \
  --message-format json-render-diagnostics)
wasm=$(sed -n 's/.*"\([^"]*\/rankmix_web\.wasm\)".*/\1/p' <<<"$messages" | tail -n 1)
if [ ! -f "$wasm" ]; then
  echo "$(basename "$0"): cargo built no rankmix_web.wasm" >&2
  exit 1
fi

rm -rf "$page"
mkdir -p "$page/pkg"
"$glue/bin/wasm-bindgen" --target web --remove-producers-section --out-dir "$page/pkg" "$wasm"
find examples/web -maxdepth 1 -type f \( -name '*.html' -o -name '*.css' -o -name '*.js' -o -name '*.svg' \) -exec cp {} "$page/" \;
echo "$page: rankmix_web_bg.wasm has $(stat --format %s "$page/pkg/rankmix_web_bg.wasm") bytes"
