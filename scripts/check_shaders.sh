#!/usr/bin/env bash
# Gives every kernel to every compiler that judges shaders and runs without a GPU: each entry point, at each tile that ships, with floats in 32
# bits, in packed halves and in native halves, as each backend of wgpu hands it to its driver.
#
#   naga        syntax, types, layouts; bindings and parameters against the launch; limits of WebGPU and Metal (tests/suite/kernels)
#   tint        Chromium's WebGPU: the only check that control flow around barriers is uniform
#   spirv-val   Vulkan 1.3 without and with runtime checks, Vulkan 1.1 with them
#   dxc         Microsoft's HLSL compiler and DXIL validator, shader models 6.8 and (32 bits) 6.0; default tiles with runtime checks too
#   metal       names and types of MSL, by clang against a stand-in for Metal's standard library
#   glsl-es     OpenGL ES 3.1, by glslang
#   amd         Mesa's compiler for three generations of AMD GPUs: no kernel may spill, save those of kernel_cost_allowed.txt
#
# usage: scripts/check_shaders.sh             a line for each failure, a table, exit status 1 if anything failed
#        scripts/check_shaders.sh --prove     checks tests/faults/*.wgsl instead, and that each fault is found by the check that its file names,
#                                             in the line that it marks, or at the entry point where that check sees no lines of WGSL
# The texts are kept in target/shaders, to be looked at. Debian 12 on x86_64 (for the compilers of GPUs); tools are downloaded once.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/shaders/tools.sh
source scripts/shaders/tools.sh

install_packages python3 spirv-tools glslang-tools clang-14
install_tint
install_dxc
install_metal_headers
install_mesa "$MESA_FOLDER"
build_statistics

folder=$(realpath -m "${CARGO_TARGET_DIR:-target}/shaders")
write_kernels "$folder"
case ${1:-} in
  "") exec python3 scripts/shaders/check.py "$folder" ;;
  --prove) exec python3 scripts/shaders/prove.py "$folder/faults" tests/faults ;;
  *) echo "usage: check_shaders.sh [--prove]" >&2; exit 2 ;;
esac
