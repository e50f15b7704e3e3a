#!/usr/bin/env bash
# cargo_for.sh TARGET COMMAND [ARGUMENTS]: cargo for another target, with whichever toolchain of this machine has or can get its
# standard library: the current one, rustup's download, or Debian's compiler, which comes with the library's sources.
# Targets: wasm32-unknown-unknown, x86_64-pc-windows-gnu, aarch64-apple-darwin (check only).
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"

target=$1
command=$2
shift 2

has_library() {
  local folder
  folder=$(rustc --print target-libdir --target "$target" 2>/dev/null) || return 1
  # Both: a download that was cut short has one of them.
  ls "$folder"/libcore-*.rlib "$folder"/libstd-*.rlib >/dev/null 2>&1
}

windows_linker() {
  if [ "$target" = x86_64-pc-windows-gnu ] && [ "$command" != check ]; then
    command -v x86_64-w64-mingw32-gcc >/dev/null || install_packages gcc-mingw-w64-x86-64
    export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER=x86_64-w64-mingw32-gcc
  fi
}

# rustup_library: rustup's download of the library. On failure its message is in `complaint`.
rustup_library() {
  complaint=
  command -v rustup >/dev/null || return 1
  local patience=()
  # macOS has no such program.
  if command -v timeout >/dev/null; then patience=(timeout 120); fi
  complaint=$("${patience[@]}" rustup target add "$target" 2>&1) && has_library
}

windows_linker
if has_library || rustup_library; then
  exec cargo "$command" --target "$target" "$@"
fi

if ! command -v dpkg-query >/dev/null; then
  if [ -n "$complaint" ]; then echo "$complaint" >&2; fi
  echo "cargo_for.sh: Rust's standard library for $target is missing; with rustup: rustup target add $target" >&2
  exit 1
fi
install_packages rustc-web cargo-web rust-web-src
if [ "$command" = clippy ]; then install_packages rust-web-clippy; fi
std=std,panic_abort
case $target in
  wasm32-unknown-unknown)
    # Debian's compiler has no linker for WebAssembly; every other toolchain brings one.
    linker=$(find "$(rustc --print sysroot)" -name rust-lld -type f -print -quit 2>/dev/null)
    if [ -z "$linker" ]; then
      command -v wasm-ld >/dev/null || install_packages lld
      linker=wasm-ld
    fi
    export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=$linker
    ;;
  x86_64-pc-windows-gnu)
    # Two start-up objects that are part of a compiled standard library and not of its sources.
    folder=/usr/lib/rustlib/$target/lib
    for object in rsbegin rsend; do
      [ -e "$folder/$object.o" ] && continue
      as_root mkdir -p "$folder"
      as_root env RUSTC_BOOTSTRAP=1 /usr/bin/rustc --target "$target" --emit=obj -O -o "$folder/$object.o" \
        "/usr/lib/rustlib/src/rust/library/rtstartup/$object.rs"
    done
    ;;
  aarch64-apple-darwin) std=std ;;
esac
# A target folder of its own: the two compilers' versions differ, and would build everything anew in turn.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/debian-rustc"
# RUSTC_BOOTSTRAP: -Zbuild-std builds the library that this compiler came with, and is not stable.
exec env -u RUSTUP_TOOLCHAIN -u CARGO PATH="/usr/bin:/bin" RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 \
  /usr/bin/cargo "$command" "-Zbuild-std=$std" --target "$target" "$@"
