#!/usr/bin/env bash
# Makes an image of 10 layers of 30 MB, 300 MB in all as they travel, as the OCI layout $1: half of each is programs and
# libraries of this host, half does not compress. Made once.
set -euo pipefail
out=${1:?usage: pull-image.sh FOLDER}
[ ! -e "$out/index.json" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out" "$out.new"
umoci init --layout "$out.new"
umoci new --image "$out.new:latest"
for nth in 0 1 2 3 4 5 6 7 8 9; do
    rm -rf "$work/root"
    mkdir -p "$work/root/$nth"
    # some thousand small files, and a large one
    find /usr/lib /usr/share /usr/bin -xdev -type f -size -400k 2>/dev/null | sort |
        awk -v n="$nth" 'NR % 10 == n && count++ < 2500' |
        tar -P -cf - --transform 's|^/||' -T - | tar -xf - -C "$work/root/$nth"
    head -c 13000000 /dev/urandom >"$work/root/$nth/random"
    tar -C "$work/root" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf "$work/layer.tar" .
    # what is missing to 30 MB
    have=$(gzip -1c "$work/layer.tar" | wc -c)
    [ "$have" -ge 30000000 ] || head -c $((30000000 - have)) /dev/urandom >"$work/root/$nth/more"
    tar -C "$work/root" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf "$work/layer.tar" .
    umoci raw add-layer --image "$out.new:latest" "$work/layer.tar"
done
umoci gc --layout "$out.new"
mv "$out.new" "$out"
