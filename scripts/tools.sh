# Sourced by the scripts beside it: where tools are kept, and how Debian's packages are installed. What is downloaded stays in
# $RANKMIX_TOOLS, a folder in the user's cache, and is downloaded once.
# shellcheck shell=bash
RANKMIX_TOOLS="${RANKMIX_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/rankmix-tools}"
export RANKMIX_TOOLS
mkdir -p "$RANKMIX_TOOLS"

# Without a display EGL looks for one for two seconds.
if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then export EGL_PLATFORM="${EGL_PLATFORM:-surfaceless}"; fi

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# install_packages NAME...: those of Debian's or Ubuntu's packages that are missing.
install_packages() {
  local missing=() name
  if ! command -v dpkg-query >/dev/null; then
    echo "$(basename "$0"): this needs Debian or Ubuntu; elsewhere install the equivalents of: $*" >&2
    return 1
  fi
  for name in "$@"; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  if [ ${#missing[@]} -eq 0 ]; then return 0; fi
  echo "installing ${missing[*]}" >&2
  as_root apt-get update -qq >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >&2
}
