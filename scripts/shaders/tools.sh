# Sourced by check_shaders.sh and kernel_cost.sh: the compilers that judge shaders, each downloaded once into $RANKMIX_TOOLS.
# shellcheck shell=bash
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools.sh"

# The versions that results are compared with.
TINT_VERSION=0.6.2
DXC_WHEEL=compushady-lrtu==0.18.0
MESA_SUITE=bookworm-backports
MESA_VERSION=25.0.7-2~bpo12+1
# For the GPUs that Debian 12 has no compiler for. A moving suite: the version is printed with the results.
NEW_MESA_SUITE=forky
# Where install_mesa puts them.
export MESA_FOLDER="$RANKMIX_TOOLS/mesa-$MESA_SUITE-$MESA_VERSION" NEW_MESA_FOLDER="$RANKMIX_TOOLS/mesa-$NEW_MESA_SUITE"

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "$(basename "$0"): the compilers that judge shaders are programs for Linux on x86_64; this is $(uname -sm)" >&2
  exit 1
fi

# install_tint: Chromium's WebGPU for Node.js; sets TINT_MODULE.
install_tint() {
  local folder="$RANKMIX_TOOLS/tint-$TINT_VERSION"
  export TINT_MODULE="$folder/node_modules/webgpu"
  command -v node >/dev/null || install_packages nodejs
  once "$folder" download_tint "$folder"
}

download_tint() {
  command -v npm >/dev/null || install_packages npm
  npm install --silent --no-fund --no-audit --prefix "$1" "webgpu@$TINT_VERSION" >&2
}

# install_dxc: Microsoft's HLSL compiler with its validator, which a Python package carries; sets DXC_LIBRARY.
install_dxc() {
  local folder="$RANKMIX_TOOLS/dxc-${DXC_WHEEL##*==}"
  export DXC_LIBRARY="$folder/compushady/backends/libdxcompiler_x86_64.so"
  once "$folder" download_dxc "$folder"
}

download_dxc() {
  python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
  # Only the compiler's library is used: which Python the package was built for does not matter.
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 \
    --dest "$1" "$DXC_WHEEL" >&2
  python3 -m zipfile -e "$1"/*.whl "$1"
  test -s "$DXC_LIBRARY"
}

# install_metal_headers: what stands in for Metal's standard library; sets METAL_HEADERS.
install_metal_headers() {
  export METAL_HEADERS="$RANKMIX_TOOLS/metal-headers"
  python3 "$(dirname "${BASH_SOURCE[0]}")/metal_headers.py" "$METAL_HEADERS"
}

# install_mesa FOLDER: Mesa's Vulkan drivers, MESA_FOLDER's or NEW_MESA_FOLDER's, with everything down to their C library, unpacked: nothing of the
# system changes, and drivers newer than the system run. Needs no root, where apt has lists.
install_mesa() {
  if [ "$1" = "$MESA_FOLDER" ]; then
    once "$1" download_mesa "$1" "$MESA_SUITE" "=$MESA_VERSION"
  else
    once "$1" download_mesa "$1" "$NEW_MESA_SUITE" ""
  fi
}

# download_mesa FOLDER SUITE VERSION: from that Debian suite; VERSION is empty or =VERSION.
download_mesa() {
  local folder=$1 suite=$2 version=$3 mirror key=/usr/share/keyrings/debian-archive-keyring.gpg deb options
  mirror=$(debian_mirror)
  if [ -z "$mirror" ] || [ ! -e "$key" ]; then
    echo "$(basename "$0"): the GPUs' compilers come from Debian's packages: this needs Debian" >&2
    return 1
  fi
  mkdir -p "$folder"/apt/{lists,archives}/partial
  echo "deb [signed-by=$key] $mirror $suite main" > "$folder/apt/sources.list"
  if [ "$suite" = "$MESA_SUITE" ]; then echo "deb [signed-by=$key] $mirror bookworm main" >> "$folder/apt/sources.list"; fi
  # An empty list of what is installed: apt then fetches every dependency.
  : > "$folder/apt/status"
  options=(-qq -y -o "Dir::State=$folder/apt" -o "Dir::State::lists=$folder/apt/lists" -o "Dir::State::status=$folder/apt/status"
    -o "Dir::Cache=$folder/apt" -o "Dir::Cache::archives=$folder/apt/archives" -o "Dir::Etc::sourcelist=$folder/apt/sources.list"
    -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o Acquire::Check-Valid-Until=false
    -o "APT::Sandbox::User=$(id -un)" -o APT::Install-Recommends=false)
  apt-get "${options[@]}" update >&2
  apt-get "${options[@]}" -t "$suite" --download-only install "mesa-vulkan-drivers$version" "mesa-drm-shim$version" libvulkan1 >&2
  for deb in "$folder"/apt/archives/mesa-vulkan-drivers_*.deb; do dpkg-deb --field "$deb" Version > "$folder/version"; done
  for deb in "$folder"/apt/archives/*.deb; do dpkg-deb --extract "$deb" "$folder"; done
  rm -r "$folder/apt"
}

# build_statistics: the program that asks a driver about compiled shaders; sets PIPELINE_STATISTICS.
build_statistics() {
  local source
  source="$(dirname "${BASH_SOURCE[0]}")/pipeline_statistics.c"
  export PIPELINE_STATISTICS="$RANKMIX_TOOLS/pipeline_statistics"
  if [ "$source" -nt "$PIPELINE_STATISTICS" ]; then
    install_packages gcc libc6-dev libvulkan-dev
    cc -O1 -Wall -Wextra -Werror -o "$PIPELINE_STATISTICS.$$" "$source" -lvulkan
    mv "$PIPELINE_STATISTICS.$$" "$PIPELINE_STATISTICS"
  fi
}

# write_kernels FOLDER: every kernel that ships, as each backend's compiler gets it; those with a fault in FOLDER/faults.
write_kernels() {
  local suite
  suite=$(built_suite)
  rm -rf "$1"
  RANKMIX_WRITE_KERNELS=$1 "$suite" >&2
}
