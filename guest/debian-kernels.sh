#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Fetches Debian's stock kernels for the tests and the benchmark, as they are: nothing is installed, built or changed.
#
#   debian-kernels.sh [OUTPUT_DIR]     default: target/guest in the repository
#
# leaves debian-cloud.bzImage (package linux-image-cloud-amd64) and debian-generic.bzImage (linux-image-amd64), and of each the
# modules that tests load, in debian-cloud.modules and debian-generic.modules. All are kept in
# ${KOMBI_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kombi}/debian-kernel with the version they are of; remove that folder to fetch
# anew. What appears there or in OUTPUT_DIR appears whole. Needs no root but to refresh apt's lists, when those are too old.

set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=${1:-$(cd "$here/.." && pwd)/target/guest}
cache=${KOMBI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kombi}/debian-kernel

# What drives persistent memory, in the order of their dependencies.
modules=({virtio/virtio_ring,virtio/virtio,virtio/virtio_mmio,nvdimm/{libnvdimm,nd_btt,nd_pmem,nd_virtio,virtio_pmem}}.ko)

say() { printf 'debian kernel: %s\n' "$*" >&2; }
die() { printf 'debian kernel: error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# The package that the metapackage $1 stands for today.
image_package() {
    apt-cache depends --important "$1" 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }'
}

# Downloads package $1 into the current folder.
download() {
    apt-get -q download "$1" >/dev/null 2>&1
}

# $1 metapackage, $2 name of the result
fetch() {
    local package work
    work=$(mktemp -d "$cache/new.XXXXXX")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$work'" EXIT
    package=$(image_package "$1")
    if [[ -z $package ]] || ! (cd "$work" && download "$package"); then
        say "refreshing apt's lists"
        as_root apt-get -qq update >/dev/null || die "apt-get update failed"
        package=$(image_package "$1")
        [[ -n $package ]] || die "apt knows no package $1; is this Debian 12?"
        (cd "$work" && download "$package") || die "apt-get download $package failed"
    fi
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar -x -C "$work" --wildcards './boot/vmlinuz-*' ||
        die "no ./boot/vmlinuz-* in $package"
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar -x -C "$work" --wildcards "${modules[@]/#/./lib/modules/*/kernel/drivers/}" ||
        die "modules are missing in $package"
    dpkg-deb --show --showformat '${Package} ${Version}\n' "$work"/*.deb >"$cache/$2.version"
    rm -rf "${cache:?}/${2%.bzImage}.modules"
    mkdir "$work/modules"
    mv "$work"/lib/modules/*/kernel/drivers/*/*.ko "$work/modules"
    mv "$work/modules" "$cache/${2%.bzImage}.modules"
    mv "$work"/boot/vmlinuz-* "$cache/$2"
    say "$2: $(cat "$cache/$2.version")"
    rm -rf "$work"
    trap - EXIT
}

mkdir -p "$cache" "$output"
exec 9>"$cache/.lock"
flock 9
# Left by runs that were killed: the lock is ours.
rm -rf "$cache"/new.*
for pair in linux-image-cloud-amd64:debian-cloud.bzImage linux-image-amd64:debian-generic.bzImage; do
    name=${pair#*:}
    of_it=${name%.bzImage}.modules
    # Caches of before the modules were kept have the kernel alone.
    [[ -e $cache/$name && -e $cache/$of_it ]] || fetch "${pair%%:*}" "$name"
    cmp -s "$cache/$name" "$output/$name" || {
        cp "$cache/$name" "$output/$name.new"
        mv "$output/$name.new" "$output/$name"
    }
    diff -rq "$cache/$of_it" "$output/$of_it" >/dev/null 2>&1 || {
        rm -rf "${output:?}/$of_it.new" "${output:?}/$of_it"
        cp -r "$cache/$of_it" "$output/$of_it.new"
        mv "$output/$of_it.new" "$output/$of_it"
    }
done
