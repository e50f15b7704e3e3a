#!/usr/bin/env bash
# build_web.sh [FOLDER]: the web page with its WebAssembly, ready to be served, in FOLDER [target/page]. Needs Rust; the wasm32
# target and wasm-bindgen are installed where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

page=${1:-target/page}
# What is there is deleted: a page that this script made, and nothing else.
if [ -e "$page" ] && [ ! -e "$page/pkg/rankmix_web.js" ] && [ -n "$(ls -A "$page")" ]; then
  echo "$(basename "$0"): $page is not empty and no page of rankmix: name another folder" >&2
  exit 1
fi

# The glue between WebAssembly and JavaScript is written by the program whose version is that of the library linked in.
version=$(sed -n '/^name = "wasm-bindgen"$/{n;s/^version = "\(.*\)"$/\1/p;}' Cargo.lock)
glue=$RANKMIX_TOOLS/wasm-bindgen-$version
if [ ! -x "$glue/bin/wasm-bindgen" ]; then
  # Not --locked: an index may not hold the very versions that its authors had.
  echo "installing wasm-bindgen-cli $version into $glue" >&2
  cargo install --quiet --version "$version" --root "$glue" wasm-bindgen-cli
fi

wasm=$(built_file 'rankmix_web\.wasm' scripts/cargo_for.sh wasm32-unknown-unknown build --profile web --package rankmix-web --lib)

rm -rf "$page"
mkdir -p "$page/pkg"
"$glue/bin/wasm-bindgen" --target web --remove-producers-section --out-dir "$page/pkg" "$wasm"
find examples/web -maxdepth 1 -type f \( -name '*.html' -o -name '*.css' -o -name '*.js' -o -name '*.svg' \) -exec cp {} "$page/" \;
echo "$page: rankmix_web_bg.wasm has $(stat --format %s "$page/pkg/rankmix_web_bg.wasm") bytes"
