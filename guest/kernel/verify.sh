#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Boots the guest's kernel in QEMU and fails unless every feature it promises is there.
#
#   verify.sh [DIR]            DIR holds vmlinux and bzImage, default: target/guest in the repository
#
# Three boots, so that each way in is used once:
#   vmlinux, plain initramfs, ACPI, two processors
#   bzImage, zstd initramfs, devices on the command line, MP table, one processor
#   vmlinux, gzip initramfs, devices on the command line, two processors
# In each, verify_probe.c runs as the first process. QEMU serves this script only; what is missing is installed.

set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
images=${1:-$here/../../target/guest}
readonly PACKAGES=(gcc libc6-dev linux-libc-dev cpio zstd gzip e2fsprogs erofs-utils attr qemu-system-x86)
readonly BOOT_SECONDS_MAX=120

say() { printf 'verify: %s\n' "$*" >&2; }
die() { printf 'verify: error: %s\n' "$*" >&2; exit 1; }

install_missing() {
    local -a missing=()
    local package
    for package in "${PACKAGES[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    local -a as_root=()
    ((EUID == 0)) || as_root=(sudo)
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null 2>&1 || {
        "${as_root[@]}" apt-get -qq update >/dev/null || die "apt-get update failed"
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null ||
            die "apt-get could not install ${missing[*]}"
    }
}

make_inputs() {
    gcc -O1 -Wall -Wextra -Werror -static -o "$room/init" "$here/verify_probe.c"
    (cd "$room" && echo init | cpio -o -H newc --quiet >initramfs.cpio)
    zstd -q -f "$room/initramfs.cpio" -o "$room/initramfs.cpio.zst"
    gzip -n -c "$room/initramfs.cpio" >"$room/initramfs.cpio.gz"
    mkdir "$room/root"
    echo hello >"$room/root/hello"
    head -c 60000 /dev/zero >"$room/root/zeros"
    setfattr -n user.kept -v yes "$room/root/hello"
    PATH=$PATH:/usr/sbin mke2fs -q -t ext4 -d "$room/root" "$room/disk.ext4" 8M
    PATH=$PATH:/usr/sbin mkfs.erofs -zlz4 "$room/disk.erofs" "$room/root" >/dev/null 2>&1
}

# boot NAME KERNEL INITRAMFS MACHINE PROCESSORS COMMAND_LINE
boot() {
    local name=$1 kernel=$2 initramfs=$3 machine=$4 processors=$5 words=$6 log=$room/$1.log status=0 started=$SECONDS
    cp "$room/disk.ext4" "$room/$name.ext4"
    timeout "$BOOT_SECONDS_MAX" qemu-system-x86_64 -M "microvm,accel=tcg,$machine" -cpu max -m 640 -smp "$processors" \
        -nodefaults -no-user-config -nographic -no-reboot -serial stdio \
        -kernel "$kernel" -initrd "$initramfs" -append "console=ttyS0 quiet panic=-1 reboot=t $words" \
        -drive "id=a,file=$room/$name.ext4,format=raw,if=none" -device virtio-blk-device,drive=a \
        -drive "id=b,file=$room/disk.erofs,format=raw,if=none,readonly=on" -device virtio-blk-device,drive=b \
        -netdev user,id=n -device virtio-net-device,netdev=n -device virtio-rng-device -device virtio-balloon-device \
        </dev/null >"$log" 2>"$room/qemu.err" || status=$?
    tr -d '\r' <"$log" >"$log.text"
    if ((status != 0)); then
        tail -n 20 "$log.text" "$room/qemu.err" >&2
        die "$name: QEMU ended with status $status after $((SECONDS - started)) s"
    fi
    grep '^FAIL' "$log.text" >&2 && failures=1
    if ! grep -qE '^probe: [0-9]+ ok, [0-9]+ failed' "$log.text"; then
        tail -n 20 "$log.text" >&2
        die "$name: the probe did not reach its end"
    fi
    # The kernel itself must have nothing to complain of.
    grep -E 'WARNING:|BUG:|Oops|Call Trace' "$log.text" >&2 && failures=1
    say "$name: $(grep '^probe:' "$log.text" | cut -d ' ' -f 2-) ($((SECONDS - started)) s)"
}

main() {
    local file
    for file in vmlinux bzImage; do
        [[ -f $images/$file ]] || die "no $images/$file; make it with guest/kernel/build.sh"
    done
    install_missing
    room=$(mktemp -d)
    trap 'rm -rf "$room"' EXIT
    failures=0
    make_inputs
    boot acpi "$images/vmlinux" "$room/initramfs.cpio" acpi=on 2 'expect=smp expect=acpi tsc_early_khz=2000000'
    boot command-line "$images/bzImage" "$room/initramfs.cpio.zst" acpi=off 1 ''
    boot mp-table "$images/vmlinux" "$room/initramfs.cpio.gz" acpi=off 2 'expect=smp'
    ((failures == 0)) || die "features are missing"
    say 'all features present'
}

main
