#!/usr/bin/env bash
# test_web.sh [--firefox] [--no-build] [NAME...]: builds the web page and tests it in a real browser without a window, Chromium or
# Firefox: golden cases, training, errors, the page itself. NAME picks tests of examples/web/tests by name: golden, training ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

browser=chromium
build=yes
names=()
for argument in "$@"; do
  case $argument in
    --firefox) browser=firefox ;;
    --no-build) build=no ;;
    -*)
      echo "$(basename "$0"): unknown option $argument; usage: test_web.sh [--firefox] [--no-build] [NAME...]" >&2
      exit 2
      ;;
    *) names+=("$argument") ;;
  esac
done

case $browser in
  chromium) command -v chromium >/dev/null || install_packages chromium ;;
  # Firefox has no software GPU of its own: it takes the machine's Vulkan driver.
  firefox)
    browser_needs=(mesa-vulkan-drivers libvulkan1)
    command -v firefox-esr >/dev/null || browser_needs+=(firefox-esr)
    if command -v dpkg-query >/dev/null; then install_packages "${browser_needs[@]}"; fi
    ;;
esac
command -v npm >/dev/null || install_packages nodejs npm

# The last versions for the Node.js of Debian 12.
packages=(playwright-core@1.61.1 puppeteer-core@24.43.1 axe-core@4.14.1)
export RANKMIX_WEB_TOOLS=$RANKMIX_TOOLS/web-tests
if [ "$(cat "$RANKMIX_WEB_TOOLS/packages" 2>/dev/null)" != "${packages[*]}" ]; then
  echo "installing ${packages[*]} into $RANKMIX_WEB_TOOLS" >&2
  rm -rf "$RANKMIX_WEB_TOOLS"
  npm install --silent --no-fund --no-audit --prefix "$RANKMIX_WEB_TOOLS" "${packages[@]}"
  echo "${packages[*]}" >"$RANKMIX_WEB_TOOLS/packages"
fi

if [ $build = yes ]; then scripts/build_web.sh; fi

files=()
if [ ${#names[@]} -eq 0 ]; then
  # The test of the page itself uses what only Chromium's driver can do.
  names=(golden training errors)
  if [ $browser = chromium ]; then names+=(page); fi
fi
for name in "${names[@]}"; do files+=("examples/web/tests/$name.mjs"); done
RANKMIX_BROWSER=$browser exec node --test --test-reporter spec --test-concurrency 1 "${files[@]}"
