#!/usr/bin/env bash
# Makes what the guests of `bench block` and `bench net` have, in the folder $1:
#   root.erofs      Debian stable with fio and iperf3, their first disk
#   devices.cpio    busybox and devices.init, their initramfs
#   data            512 MiB that are no zeros, their second disk
# Made once; remove the folder to make it again. Needs no root.
set -euo pipefail
out=${1:?usage: bench/guest/devices.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
if [ ! -e "$out/root.erofs" ]; then
    for tool in mmdebstrap mkfs.erofs; do
        command -v "$tool" >/dev/null || {
            echo "devices: $tool is missing; run setup/packages.sh bench-devices" >&2
            exit 1
        }
    done
    echo "devices: mmdebstrap runs (a minute)"
    mode=unshare
    [ "$(id -u)" -ne 0 ] || mode=root
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mmdebstrap --quiet --mode=$mode --variant=minbase --include=fio,iperf3 \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
        bookworm "$work/root.tar"
    mkdir "$work/root"
    tar -C "$work/root" --no-same-owner --exclude='./dev/*' -xf "$work/root.tar"
    mkfs.erofs --quiet --all-root -T0 "$out/root.erofs.new" "$work/root"
    mv "$out/root.erofs.new" "$out/root.erofs"
fi
packed=$(mktemp -d)
trap 'rm -rf "$packed" "${work:-}"' EXIT
mkdir "$packed"/{bin,dev,proc,sys,root}
cp /bin/busybox "$packed/bin/"
install -m 755 "$here/devices.init" "$packed/init"
(cd "$packed" && find . | cpio --quiet -o -H newc) >"$out/devices.cpio"
[ -e "$out/data" ] || {
    head -c 512M /dev/urandom >"$out/data.new"
    mv "$out/data.new" "$out/data"
}
