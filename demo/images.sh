#!/usr/bin/env bash
# Makes the demo's images on the spot, as OCI image layouts below the folder $1:
#   busybox  Debian's busybox-static and nothing else
#   debian   Debian stable with python3-minimal (by mmdebstrap)
# Made once; remove the folder to make them again. Needs no root.
set -euo pipefail
out=${1:?usage: demo/images.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

say() { printf 'images: %s\n' "$*"; }

# $1 name, $2 layer.tar, then arguments of umoci config
publish() {
    local name=$1 layer=$2
    shift 2
    rm -rf "$out/$name.new" "$out/$name"
    umoci init --layout "$out/$name.new"
    umoci new --image "$out/$name.new:latest"
    umoci raw add-layer --image "$out/$name.new:latest" "$layer"
    umoci config --image "$out/$name.new:latest" --history.created_by "demo/images.sh" "$@"
    umoci gc --layout "$out/$name.new"
    mv "$out/$name.new" "$out/$name"
}

if [ ! -e "$out/busybox/index.json" ]; then
    start=$SECONDS
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    mkdir -p "$work"/{bin,etc,root,tmp,var,proc,sys,dev}
    chmod 1777 "$work/tmp"
    cp /bin/busybox "$work/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$work/bin/$applet"
    done
    cp "$here/etc/passwd" "$here/etc/group" "$work/etc/"
    tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf "$work.tar" .
    publish busybox "$work.tar" --config.cmd sh --config.env PATH=/bin
    rm -rf "$work" "$work.tar"
    trap - EXIT
    say "busybox: $((SECONDS - start)) s"
fi

if [ ! -e "$out/debian/index.json" ]; then
    start=$SECONDS
    say "debian with python3: mmdebstrap runs (about half a minute)"
    layer=$(mktemp --suffix .tar)
    trap 'rm -f "$layer"' EXIT
    mode=unshare
    [ "$(id -u)" -ne 0 ] || mode=root
    mmdebstrap --quiet --mode=$mode --variant=minbase --include=python3-minimal \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
        bookworm "$layer"
    publish debian "$layer" --config.cmd bash
    rm -f "$layer"
    trap - EXIT
    say "debian: $((SECONDS - start)) s"
fi
