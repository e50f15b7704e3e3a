#!/usr/bin/env bash
# dx12_environment.sh [NAME=VALUE...] PROGRAM.exe [ARGUMENTS]: runs a Windows program on DirectX 12 without a GPU: Wine 10, whose
# vkd3d translates to Vulkan, on lavapipe 25, with Microsoft's shader compiler FXC. The program sees the checkout, read-only, at its
# own path. Without arguments it only installs what is missing.
#
# Debian 12 has Wine 8, whose vkd3d computes wrong results: Wine lives in a small Debian 13 of its own in $RANKMIX_TOOLS (3 minutes
# and 2 GB, once). Needs root, or sudo, for namespaces of mounts and processes: when the program ends nothing is left mounted or running.
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"
if [ "$(uname -m)" != x86_64 ]; then
  echo "$(basename "$0"): Wine runs programs for x86_64 here, on a machine of that kind; this is $(uname -m)" >&2
  exit 1
fi
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

system=$RANKMIX_TOOLS/debian13
# d3dcompiler_47.dll, version 6.3.9600, as this Python package for Windows brings it.
fxc_package=kivy_deps.angle==0.5.0
log=$RANKMIX_TOOLS/debian13.log

# Runs a command in the Debian of its own, in namespaces that end with it, or with this script.
inside() {
  # shellcheck disable=SC2016
  as_root setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child bash -euc '
    system=$1 checkout=$2
    shift 2
    mount -t proc proc "$system/proc"
    mount --rbind /dev "$system/dev"
    mount -t tmpfs tmpfs "$system/tmp"
    mkdir -p "$system/$checkout"
    mount --bind -o ro "$checkout" "$system/$checkout"
    exec chroot "$system" env --ignore-environment PATH=/usr/lib/wine:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
      XDG_RUNTIME_DIR=/tmp WINEPREFIX=/root/wine WINEDEBUG=-all "$@"
  ' bash "$system" "$checkout" "$@"
}

install_debian() {
  install_packages debootstrap
  local mirror
  mirror=$(debian_mirror)
  as_root rm -rf "$system.part"
  as_root debootstrap --variant=minbase trixie "$system.part" ${mirror:+"$mirror"}
  # This machine's own way to the network.
  apt-config dump | grep -E '^Acquire::(Check-|https?::Proxy)' | as_root tee "$system.part/etc/apt/apt.conf.d/99host" || true
  as_root rm -rf "$system"
  as_root mv "$system.part" "$system"
}

install_wine() {
  inside apt-get update
  inside DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends wine wine64 mesa-vulkan-drivers libvulkan1 xvfb xauth
  inside rm -rf /root/wine
  inside wine64 wineboot --init
}

install_fxc() {
  local folder=$RANKMIX_TOOLS/fxc.part
  python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
  rm -rf "$folder"
  python3 -m pip download --quiet --no-deps --only-binary=:all: --platform win_amd64 --python-version 3.11 --implementation cp \
    --dest "$folder" "$fxc_package"
  python3 -m zipfile -e "$folder"/*.whl "$folder/package"
  find "$folder/package" -name d3dcompiler_47.dll -exec cp {} "$folder" \;
  test -s "$folder/d3dcompiler_47.dll"
  # In place of Wine's own.
  as_root cp "$folder/d3dcompiler_47.dll" "$system/root/wine/drive_c/windows/system32/"
  rm -rf "$folder"
}

# step NAME: what is made by install_NAME, unless its mark is there.
step() {
  as_root test -e "$system/root/done.$1" && return
  echo "dx12_environment.sh: installing $1 into $system" >&2
  local status
  # Not `install_... || ...`: bash goes on after a failure inside what it is to judge.
  set +e
  (
    set -e
    "install_$1"
  ) >>"$log" 2>&1
  status=$?
  set -e
  if [ $status -ne 0 ]; then
    tail -n 20 "$log" >&2
    echo "dx12_environment.sh: installing $1 failed, see $log" >&2
    return 1
  fi
  as_root touch "$system/root/done.$1"
}

# One at a time: programs share Wine's drive C: and the display's number.
exec 9>"$system.lock"
flock 9
step debian
step wine
step fxc
[ $# -gt 0 ] || exit 0

# In the namespace this shell is the first process: when it ends, the display and Wine's server end too.
# shellcheck disable=SC2016
inside VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json WINEDLLOVERRIDES=d3dcompiler_47=n RANKMIX_DEVICE=dx12 bash -c '
  Xvfb -displayfd 3 -screen 0 800x600x24 -nolisten tcp 3>/tmp/display >/tmp/display.log 2>&1 &
  until [ -s /tmp/display ]; do
    kill -0 $! 2>/dev/null || { cat /tmp/display.log >&2; exit 1; }
    sleep 0.1
  done
  DISPLAY=:$(cat /tmp/display)
  export DISPLAY
  while [[ $1 == *=* ]]; do export "$1"; shift; done
  cd "$0" && wine64 "$@"' "$checkout" "$@"
