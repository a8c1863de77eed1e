#!/usr/bin/env bash
# Installs the Debian packages that tests need, where that is possible: on Debian, as root.
# Elsewhere it says what is missing, and the tests that need it skip with the same reason.
set -euo pipefail

missing=()
for package in "$@"; do
  dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
    command -v "$package" >/dev/null || missing+=("$package")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "not installed (needs Debian and root): ${missing[*]}; the tests that need them will skip" >&2
fi
