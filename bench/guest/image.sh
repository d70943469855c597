#!/usr/bin/env bash
# Makes what the interpreters' rows of `bench engine` run in, below the folder $1:
#   root/       Debian stable with CPython, Perl, Lua, V8 (nodejs) and HotSpot, for the
#               native runs in a chroot
#   root.erofs  the same, for the machines
# Made once; remove the folder to make it again. Needs no root.
set -euo pipefail
out=${1:?usage: bench/guest/image.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
[ ! -e "$out/root.erofs" ] || exit 0
for tool in mmdebstrap mkfs.erofs javac; do
    command -v "$tool" >/dev/null || {
        echo "image: $tool is missing; run setup/packages.sh bench-engine" >&2
        exit 1
    }
done
mkdir -p "$out"
echo "image: mmdebstrap runs (some minutes)"
tar=$(mktemp --suffix .tar)
trap 'rm -f "$tar"' EXIT
mode=unshare
[ "$(id -u)" -ne 0 ] || mode=root
# openjdk's post-installation wants /proc and a folder for manual pages
mmdebstrap --quiet --mode=$mode --variant=minbase \
    --include=python3,perl,lua5.4,nodejs,default-jre-headless \
    --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --setup-hook='mkdir -p "$1/usr/share/man/man1"' \
    --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
    bookworm "$tar"
rm -rf "$out/root"
mkdir -p "$out/root"
tar -C "$out/root" --no-same-owner --exclude='./dev/*' -xf "$tar"
mkdir -p "$out/root/bench"
cp "$here"/interpreters/* "$out/root/bench/"
javac --release 17 -d "$out/root/bench" "$here/interpreters/Mix.java"
mkfs.erofs --quiet --all-root -T0 "$out/root.erofs.new" "$out/root"
mv "$out/root.erofs.new" "$out/root.erofs"
