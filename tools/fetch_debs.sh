#!/usr/bin/env bash
# fetch_debs.sh FOLDER PACKAGE...: unpacks Debian packages, and those they need that this machine lacks, into FOLDER.
# Nothing is installed and no root is needed: apt works on lists and a cache of its own.
set -euo pipefail

folder=$1
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"

apt() {
  apt-get -qq -o Dir::State="$work/state" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$work/cache" \
    -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 "$@"
}

apt update
apt install --download-only --no-install-recommends "$@"
for deb in "$work"/cache/archives/*.deb; do
  dpkg -x "$deb" "$folder"
done
