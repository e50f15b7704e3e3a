#!/usr/bin/env bash
# What real GPUs' compilers make of every entry point that GPUs are given (*_subgroup.wgsl is for software adapters) at the tile that its file
# gives, without the GPUs: registers, spills, scratch memory, occupancy, workgroup memory, instructions. Mesa's drivers compile for GPUs that are not there; nothing executes.
#
# usage: scripts/kernel_cost.sh               AMD's Vega 10, Navi 21 and Navi 31, with a pinned Mesa: a table, and exit status 1 if a kernel
#                                             spills that kernel_cost_allowed.txt does not name (at every other tile too: check_shaders.sh)
#        scripts/kernel_cost.sh --all         AMD GFX1201, NVIDIA Turing and Ampere, Apple M1 and Adreno 740 as well, with Debian's newest Mesa
#        scripts/kernel_cost.sh --markdown    writes the tables of all of them into docs/kernel-cost.md
# Debian 12 on x86_64; tools are downloaded once.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/shaders/tools.sh
source scripts/shaders/tools.sh

options=()
all=no
drivers=("$MESA_FOLDER")
for option in "$@"; do
  case $option in
    --all) all=yes ;;
    --markdown) all=yes; options+=(--markdown docs/kernel-cost.md) ;;
    *) echo "usage: kernel_cost.sh [--all] [--markdown]" >&2; exit 2 ;;
  esac
done
if [ $all = yes ]; then
  options+=(--all)
  drivers+=("$NEW_MESA_FOLDER")
fi

install_packages python3
for driver in "${drivers[@]}"; do install_mesa "$driver"; done
build_statistics

folder=$(realpath -m "${CARGO_TARGET_DIR:-target}/kernel-cost")
write_kernels "$folder"
exec python3 scripts/shaders/cost.py "$folder" "${options[@]}"
