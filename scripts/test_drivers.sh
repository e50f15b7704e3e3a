#!/usr/bin/env bash
# test_drivers.sh [NAME...]: the tests of every device (golden cases in f32 and f16, random shapes, algebraic facts, training, ...) on
# every driver that runs without a GPU, each checked and trusted, and a table of what passed. NAME: lavapipe-4, lavapipe-8,
# lavapipe-16 (Vulkan, at that subgroup size), llvmpipe (OpenGL), swiftshader (Vulkan at nearly the limits that WebGPU guarantees), cpu (the
# CPU executor). Without names: all.
#
# A row counts only if the test program itself says that it ran on the driver of that name. Fails if a test does or is ignored, or if a driver is
# missing.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

all=(lavapipe-4 lavapipe-8 lavapipe-16 llvmpipe swiftshader cpu)
if [ $# -gt 0 ]; then rows=("$@"); else rows=("${all[@]}"); fi
for row in "${rows[@]}"; do
  case " ${all[*]} " in
    *" $row "*) ;;
    *)
      echo "test_drivers.sh: there is no driver \`$row\`; there are: ${all[*]}" >&2
      exit 2
      ;;
  esac
done

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$logs}"
# No display: GL without one.
export EGL_PLATFORM=surfaceless

# The first of the files, or an error that says what is missing.
manifest() {
  local found=("$@")
  [ -e "${found[0]}" ] || {
    echo "test_drivers.sh: there is no Vulkan driver at $1" >&2
    return 1
  }
  echo "${found[0]}"
}

# Sets, for a row: the environment of its driver, the backend whose tests run, and what the test program must say of the device.
prepare() {
  local file
  environment=()
  case $1 in
    lavapipe-*)
      install_packages libvulkan1 mesa-vulkan-drivers
      file=$(manifest /usr/share/vulkan/icd.d/lvp_icd*.json)
      local size=${1#lavapipe-}
      environment=("VK_DRIVER_FILES=$file" "VK_ICD_FILENAMES=$file" "LP_NATIVE_VECTOR_WIDTH=$((size * 32))")
      backend=vulkan
      expected="^device vulkan: llvmpipe .*; subgroups of $size; "
      ;;
    llvmpipe)
      install_packages libegl1 libgl1-mesa-dri
      environment=(LIBGL_ALWAYS_SOFTWARE=1 GALLIUM_DRIVER=llvmpipe VK_DRIVER_FILES=/nonexistent VK_ICD_FILENAMES=/nonexistent)
      backend=gl
      expected='^device gl: llvmpipe '
      ;;
    swiftshader)
      install_packages libvulkan1 chromium
      file=$(manifest /usr/lib/chromium/vk_swiftshader_icd.json)
      environment=("VK_DRIVER_FILES=$file" "VK_ICD_FILENAMES=$file")
      backend=vulkan
      expected='^device vulkan: SwiftShader '
      ;;
    cpu)
      backend=cpu
      expected='^device cpu: CPU executor '
      ;;
  esac
}

# The number in front of a word of the test program's summary.
count() { sed -nE "s/^test result: .*[ ;]([0-9]+) $1;.*/\1/p" "$2"; }

suite=$(built_suite)

failures=0
for row in "${rows[@]}"; do
  log=$logs/$row
  prepare "$row"
  echo "test_drivers.sh: $row" >&2
  begun=$SECONDS
  env "${environment[@]}" "$suite" "::$backend" >"$log" 2>&1 || true
  driver=$(sed -n "s/^device $backend: //p" "$log")
  passed=$(count passed "$log")
  failed=$(count failed "$log")
  ignored=$(count ignored "$log")
  verdict=ok
  if ! grep -qE "$expected" "$log"; then
    verdict="WRONG DRIVER"
  elif [ "${passed:-0}" -eq 0 ] || [ "${failed:-1}" -ne 0 ]; then
    verdict=FAILED
  elif [ "${ignored:-1}" -ne 0 ]; then
    # A test is ignored only where its device cannot be opened, and this driver is to be there, trusted and checked.
    verdict=IGNORED
  fi
  if [ "$verdict" != ok ]; then
    failures=$((failures + 1))
    grep -E '^test .* FAILED$' "$log" | head -n 40 >&2 || true
    sed -n '/^failures:$/,$p' "$log" | sed -n 1,100p >&2
    [ -n "$passed" ] || tail -n 20 "$log" >&2
  fi
  {
    printf '%-12s %-13s %6s %6s %7s %5ss  %s\n' "$row" "$verdict" "${passed:--}" "${failed:--}" "${ignored:--}" $((SECONDS - begun)) "$driver"
    # Why tests were ignored, and how many for each reason.
    sed -nE 's/^test .* ignored(, | \()(.*)$/\2/p' "$log" | sed 's/)$//' | sort | uniq -c | sed 's/^/             ignored: /'
  } >>"$logs/table"
done

echo
printf '%-12s %-13s %6s %6s %7s %6s  %s\n' row result passed failed ignored time "device, as the test program reports it"
cat "$logs/table"
for package in mesa-vulkan-drivers libgl1-mesa-dri chromium; do
  dpkg-query --show --showformat='${Package} ${Version}\n' "$package" 2>/dev/null || true
done
[ "$failures" -eq 0 ] || {
  echo "test_drivers.sh: $failures of ${#rows[@]} drivers failed" >&2
  exit 1
}
