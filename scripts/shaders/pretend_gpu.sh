#!/usr/bin/env bash
# pretend_gpu.sh FOLDER DEVICE COMMAND [ARGUMENTS]: runs a program on Mesa's driver for a GPU that is not there. The driver compiles as if it
# were; nothing executes. FOLDER is where install_mesa of tools.sh unpacked it; devices:
#   amd:vega10 amd:navi21 amd:navi31 amd:gfx1201    nvidia:162 (Turing) nvidia:172 (Ampere)    apple:m1    adreno:630 ... adreno:750
set -euo pipefail
mesa=$1
device=$2
shift 2

libraries="$mesa/usr/lib/x86_64-linux-gnu"
export NVK_I_WANT_A_BROKEN_VULKAN_DRIVER=1
case $device in
  amd:*) driver=radeon shim=amdgpu; export AMDGPU_GPU_ID=${device#*:} ;;
  nvidia:*) driver=nouveau shim=nouveau; export NOUVEAU_CHIPSET=${device#*:} ;;
  adreno:*) driver=freedreno shim=freedreno; export FD_GPU_ID=${device#*:} ;;
  apple:m1) driver=asahi shim=asahi ;;
  *) echo "pretend_gpu.sh: no device \`$device\`" >&2; exit 1 ;;
esac
loader=$(find "$mesa" -path '*x86_64-linux-gnu/ld-linux-x86-64.so.2' -print -quit)
if [ -z "$loader" ]; then echo "pretend_gpu.sh: there is no Mesa in $mesa" >&2; exit 1; fi

# The driver's description names its library by the path that it would have if it were installed.
description=$(mktemp --suffix=.json)
trap 'rm -f "$description"' EXIT
sed -E "s#(\"library_path\": *\").*(libvulkan[^\"/]*\")#\1$libraries/\2#" "$mesa/usr/share/vulkan/icd.d/${driver}_icd.json" > "$description"
export VK_DRIVER_FILES=$description VK_ICD_FILENAMES=$description MESA_SHADER_CACHE_DISABLE=true
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"
# With the C library that came with the driver, which may be newer than the system's.
"$loader" --library-path "$mesa/lib/x86_64-linux-gnu:$libraries" --preload "$libraries/lib${shim}_noop_drm_shim.so" "$@"
