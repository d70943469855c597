#!/usr/bin/env bash
# Installs the Debian packages of the named groups, only those that are missing.
# As an ordinary user it uses sudo for apt-get and for nothing else.
# usage: setup/packages.sh GROUP…   (build, demo, test, bench, bench-devices, bench-engine)
set -euo pipefail

declare -A packages=(
    # the kernel's own build needs are in guest/kernel/build.sh
    [build]="build-essential cpio xz-utils"
    # images made on the spot
    [demo]="busybox-static mmdebstrap umoci uidmap ca-certificates"
    # reading back what we write, other tools' images, a registry; qemu-storage-daemon, which serves drives
    [test]="erofs-utils skopeo iproute2 docker-registry qemu-system-common"
    [bench]="qemu-system-x86 busybox-static cpio gcc libc6-dev skopeo umoci docker-registry"
    # a guest with fio and iperf3, and iperf3's other end
    [bench-devices]="mmdebstrap uidmap erofs-utils iperf3 iproute2 cpio"
    # the interpreters' root
    [bench-engine]="mmdebstrap uidmap erofs-utils default-jdk-headless"
)

missing=()
for group in "$@"; do
    for package in ${packages[$group]:?"setup/packages.sh: no group $group"}; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || missing+=("$package")
    done
done

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing; install Rust with rustup (https://rustup.rs), then run make again" >&2
    exit 1
fi
[ ${#missing[@]} -gt 0 ] || exit 0

sudo=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || {
        echo "setup: missing packages: ${missing[*]}; install them as root with apt-get" >&2
        exit 1
    }
    sudo=(sudo)
fi
echo "setup: installing ${missing[*]}"
# no terminal: debconf then asks nothing, without a variable that sudo would drop
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
