#!/usr/bin/env bash
# Puts the headers of SIMDe 0.8.2 under FOLDER/usr/include, for tests/test_native_simde.py:
#     scripts/get_simde.sh FOLDER && export SIMDE_INCLUDE=FOLDER/usr/include
# They come from the package libsimde-dev of Debian trixie, by this machine's own Debian mirror:
# bookworm's 0.7.4 lacks most of AVX-512BW. Nothing is installed, and apt's own state stays as it is.
set -euo pipefail

folder=${1:?usage: scripts/get_simde.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
header=usr/include/simde/x86/avx512.h
if [ -e "$folder/$header" ]; then exit 0; fi

mirror=$(apt-get indextargets --format '$(SITE)' | grep -m 1 -E '/debian/?$') || {
  echo "SIMDe comes from a Debian mirror, but apt has none; install libsimde-dev 0.8 by other means." >&2
  exit 1
}

# A private apt: its sources, its lists, its cache.
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $mirror trixie main" > "$apt/sources.list"
private_apt() {
  apt-get --quiet --quiet \
    --option Dir::Etc::SourceList="$apt/sources.list" --option Dir::Etc::SourceParts=/dev/null \
    --option Dir::State::Lists="$apt/lists" --option Dir::State::status=/dev/null \
    --option Dir::Cache="$apt" --option APT::Sandbox::User=root "$@"
}
private_apt update
cd "$apt"
private_apt download libsimde-dev
dpkg --extract libsimde-dev_*.deb "$folder"
test -e "$folder/$header"
