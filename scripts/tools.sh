# Sourced by the scripts beside it: where tools are kept, and how Debian's packages are installed. What is downloaded stays in
# $RANKMIX_TOOLS, a folder in the user's cache, and is downloaded once.
# shellcheck shell=bash
RANKMIX_TOOLS="${RANKMIX_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/rankmix-tools}"
mkdir -p "$RANKMIX_TOOLS"
# Programs that are started in another folder use it too.
RANKMIX_TOOLS=$(cd "$RANKMIX_TOOLS" && pwd)
export RANKMIX_TOOLS

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

# debian_mirror: where this machine gets Debian's packages from; nothing if it is not a Debian.
debian_mirror() {
  command -v apt-get >/dev/null || return 0
  # shellcheck disable=SC2016 # apt-get fills it in
  local ask=(apt-get indextargets --format '$(REPO_URI)')
  # It names no source whose list was never fetched.
  [ -n "$("${ask[@]}")" ] || as_root apt-get update -qq >&2
  "${ask[@]}" | grep -m1 '/debian/$' || true
}

# once FOLDER COMMAND...: has the command fill the folder, unless that is done: one script at a time, and what was interrupted begins anew.
once() {
  local folder=$1
  shift
  if [ -e "$folder/complete" ]; then return 0; fi
  (
    flock 9
    if [ -e "$folder/complete" ]; then exit 0; fi
    echo "$(basename "$0"): installing into $folder" >&2
    rm -rf "$folder"
    mkdir -p "$folder"
    "$@"
    touch "$folder/complete"
  ) 9>"$folder.lock"
}

# built_file NAME CARGO...: runs a cargo that builds, and prints the path of the file that it made; NAME is a regular expression. Cargo alone knows
# the folder: cargo_for.sh may use another.
built_file() {
  local name=$1 messages path
  shift
  messages=$("$@" --message-format json-render-diagnostics) || return 1
  path=$(sed -nE "s|.*\"([^\"]*/$name)\".*|\1|p" <<<"$messages" | tail -n 1)
  if [ ! -f "$path" ]; then
    echo "$(basename "$0"): cargo built no $name" >&2
    return 1
  fi
  echo "$path"
}

# built_suite: builds the tests of every device, and prints the path of their program.
built_suite() {
  built_file 'suite-[0-9a-f]+' cargo test --release --all-features --test suite --no-run
}
