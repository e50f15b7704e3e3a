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
export NEW_MESA_SUITE=forky

# install_tint: Chromium's WebGPU for Node.js; sets TINT_MODULE.
install_tint() {
  local folder="$RANKMIX_TOOLS/tint-$TINT_VERSION"
  export TINT_MODULE="$folder/node_modules/webgpu"
  if [ ! -e "$folder/complete" ]; then
    command -v node >/dev/null || install_packages nodejs
    command -v npm >/dev/null || install_packages npm
    mkdir -p "$folder"
    npm install --silent --no-fund --no-audit --prefix "$folder" "webgpu@$TINT_VERSION" >&2
    touch "$folder/complete"
  fi
}

# install_dxc: Microsoft's HLSL compiler with its validator, which a Python package carries; sets DXC_LIBRARY.
install_dxc() {
  local folder="$RANKMIX_TOOLS/dxc-${DXC_WHEEL##*==}"
  export DXC_LIBRARY="$folder/compushady/backends/libdxcompiler_x86_64.so"
  if [ ! -e "$DXC_LIBRARY" ]; then
    python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
    mkdir -p "$folder"
    # Only the compiler's library is used: which Python the package was built for does not matter.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 \
      --dest "$folder" "$DXC_WHEEL" >&2
    python3 -m zipfile -e "$folder"/*.whl "$folder"
  fi
}

# install_metal_headers: what stands in for Metal's standard library; sets METAL_HEADERS.
install_metal_headers() {
  export METAL_HEADERS="$RANKMIX_TOOLS/metal-headers"
  python3 "$(dirname "${BASH_SOURCE[0]}")/metal_headers.py" "$METAL_HEADERS"
}

# install_mesa SUITE: Mesa's Vulkan drivers of that Debian suite with everything down to their C library, unpacked into a folder of their
# own: nothing of the system changes, and drivers newer than the system run. Needs no root.
install_mesa() {
  local suite=$1 folder="$RANKMIX_TOOLS/mesa-$1" mirror key=/usr/share/keyrings/debian-archive-keyring.gpg deb options
  if [ -e "$folder/complete" ]; then return 0; fi
  # shellcheck disable=SC2016 # apt-get fills it in
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -m1 'debian/$' || true)
  if [ -z "$mirror" ] || [ ! -e "$key" ]; then
    echo "$(basename "$0"): the GPUs' compilers come from Debian's packages: this needs Debian" >&2
    return 1
  fi
  rm -rf "$folder"
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
  local packages=(mesa-vulkan-drivers mesa-drm-shim libvulkan1)
  if [ "$suite" = "$MESA_SUITE" ]; then packages=("mesa-vulkan-drivers=$MESA_VERSION" "mesa-drm-shim=$MESA_VERSION" libvulkan1); fi
  apt-get "${options[@]}" -t "$suite" --download-only install "${packages[@]}" >&2
  for deb in "$folder"/apt/archives/mesa-vulkan-drivers_*.deb; do dpkg-deb --field "$deb" Version > "$folder/version"; done
  for deb in "$folder"/apt/archives/*.deb; do dpkg-deb --extract "$deb" "$folder"; done
  rm -r "$folder/apt"
  touch "$folder/complete"
}

# build_statistics: the program that asks a driver about compiled shaders; sets PIPELINE_STATISTICS.
build_statistics() {
  local source
  source="$(dirname "${BASH_SOURCE[0]}")/pipeline_statistics.c"
  export PIPELINE_STATISTICS="$RANKMIX_TOOLS/pipeline_statistics"
  if [ "$source" -nt "$PIPELINE_STATISTICS" ]; then
    install_packages gcc libc6-dev libvulkan-dev
    cc -O1 -Wall -Wextra -Werror -o "$PIPELINE_STATISTICS.new" "$source" -lvulkan
    mv "$PIPELINE_STATISTICS.new" "$PIPELINE_STATISTICS"
  fi
}

# write_kernels FOLDER: every kernel that ships, as each backend's compiler gets it; those with a fault in FOLDER/faults.
write_kernels() {
  local suite
  suite=$(cargo test --release --all-features --test suite --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*suite-[^"]*\)".*/\1/p' | tail -n 1)
  if [ -z "$suite" ]; then
    cargo test --release --all-features --test suite --no-run
    return 1
  fi
  rm -rf "$1"
  RANKMIX_WRITE_KERNELS=$1 "$suite" >&2
}
