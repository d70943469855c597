#!/usr/bin/env bash
# Makes what the programs of programs/ run in, from Debian's packages; prints the folder that has it:
#   image/   an OCI image layout, for the guest
#   root/    the same files, for the host (of other user ids where an ordinary user made them)
#
# usage: lab/guests/image.sh PACKAGE…
#
# Kept in ${KOMBI_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kombi}/guests/HASH by the packages' names. Needs no root.
set -euo pipefail
cache=${KOMBI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kombi}/guests
packages=$(printf '%s\n' "$@" | sort -u)
out=$cache/$({ cat "$0"; echo "$packages"; } | sha256sum | cut -c 1-16)

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
if [ ! -e "$out/image/index.json" ]; then
    printf 'guests: an image with %s: mmdebstrap runs (minutes for all of them)\n' "${packages//$'\n'/, }" >&2
    start=$SECONDS
    mode=unshare within=(unshare --map-root-user --map-auto)
    [ "$(id -u)" -ne 0 ] || mode=root within=()
    # Files of an ordinary user's subordinate ids are removed within the namespace that has these ids. The lock is
    # ours: whatever is called new, of any hash, was left by a run that was killed.
    trap '"${within[@]}" rm -rf "$out.new"' EXIT
    "${within[@]}" rm -rf "$cache"/*.new
    mkdir -p "$out.new/root"
    mmdebstrap --quiet --mode=$mode --variant=minbase --include="${packages//$'\n'/,}" \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --essential-hook='mkdir -p "$1"/usr/share/man/man1 "$1"/usr/share/man/man7' \
        --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
        bookworm "$out.new/layer.tar"
    umoci init --layout "$out.new/image"
    umoci new --image "$out.new/image:latest"
    umoci raw add-layer --image "$out.new/image:latest" "$out.new/layer.tar"
    umoci config --image "$out.new/image:latest" --history.created_by lab/guests/image.sh --config.cmd sh
    umoci gc --layout "$out.new/image"
    # Devices come from the host.
    "${within[@]}" tar -C "$out.new/root" --exclude='./dev/*' -xf "$out.new/layer.tar"
    rm "$out.new/layer.tar"
    mv "$out.new" "$out"
    trap - EXIT
    printf 'guests: the image took %s s\n' "$((SECONDS - start))" >&2
fi
echo "$out"
