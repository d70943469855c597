#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Builds the guest's kernel: vmlinux (uncompressed ELF) and bzImage, from Debian's package linux-source-6.12, patches/*.patch
# and config/*.config.
#
#   build.sh [OUTPUT_DIR]      default: target/guest in the repository
#
# Both files are kept in ${KOMBI_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kombi}/kernel/HASH, where HASH covers configuration, patches,
# the source package's version, the compiler's version and this script. Concurrent builds of one HASH wait for each other; what
# appears in the cache or in OUTPUT_DIR appears whole. apt-get is used (by sudo unless root) only when a package is missing.
#
# KOMBI_KERNEL_JOBS=N        compile jobs, default: all processors
# KOMBI_KERNEL_KEEP=DIR      unpack and build in DIR and keep it, for work on the configuration

set -euo pipefail
export LC_ALL=C

readonly SOURCE_PACKAGE=linux-source-6.12
readonly SOURCE_TAR=/usr/src/linux-source-6.12.tar.xz
# What the build calls, and the package each comes from.
readonly PACKAGES=(bc bison flex gcc libc6-dev libelf-dev lz4 make patch perl tar util-linux xz-utils "$SOURCE_PACKAGE")

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
output=${1:-$repository/target/guest}
cache=${KOMBI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kombi}/kernel
jobs=${KOMBI_KERNEL_JOBS:-$(nproc)}

say() { printf 'kernel: %s\n' "$*" >&2; }
die() { printf 'kernel: error: %s\n' "$*" >&2; exit 1; }

# --- what is needed -------------------------------------------------------------------------------------------------------

missing_packages() {
    local package
    for package in "${PACKAGES[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s\n' "$package"
    done
}

as_root() {
    if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

install_missing() {
    local -a missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    command -v apt-get >/dev/null || die "no apt-get; install: ${missing[*]}"
    ((EUID == 0)) || command -v sudo >/dev/null || die "neither root nor sudo; install: ${missing[*]}"
    # The lists may be old or absent: refresh them only when that is what fails.
    as_root apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null 2>&1 || {
        as_root apt-get -qq update >/dev/null || die "apt-get update failed"
        as_root apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null ||
            die "apt-get could not install ${missing[*]}"
    }
}

# --- progress -------------------------------------------------------------------------------------------------------------

# Reads lines of work done, of which about $2 are expected, and reports: one line rewritten on a terminal, else every 20 s.
progress() {
    local label=$1 expected=$2 done_=0 start=$SECONDS last=$SECONDS line percent
    while IFS= read -r line; do
        done_=$((done_ + 1))
        percent=$((done_ * 100 / expected))
        ((percent <= 99)) || percent=99
        if [[ -t 2 ]]; then
            ((done_ % 8)) || printf '\rkernel: %s %3d %% (%d s)\e[K' "$label" "$percent" "$((SECONDS - start))" >&2
        elif ((SECONDS - last >= 20)); then
            last=$SECONDS
            say "$label $percent % ($((SECONDS - start)) s)"
        fi
    done
    if [[ -t 2 ]]; then printf '\r\e[K' >&2; fi
    say "$label done ($((SECONDS - start)) s)"
}

# --- build ----------------------------------------------------------------------------------------------------------------

# The name of what is built: everything that can change the result.
input_hash() {
    {
        dpkg-query -W -f '${Package} ${Version}\n' "$SOURCE_PACKAGE"
        gcc --version | head -n 1
        ld --version | head -n 1
        cd "$here"
        find . -maxdepth 2 ! -name 'verify*' -type f \( -name '*.config' -o -name '*.patch' -o -name '*.sh' -o -name 'cc_*.c' \) -print0 2>/dev/null |
            sort -z | xargs -0 sha256sum
    } | sha256sum | cut -c 1-24
}

kernel_make() {
    # Fixed names and date: equal input gives equal bytes.
    make -C "$work/source" ARCH=x86_64 CC="$work/cc_with_common_headers" HOSTCC=gcc KBUILD_BUILD_USER=kombi KBUILD_BUILD_HOST=kombi KBUILD_BUILD_VERSION=1 \
        KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 2026' "$@"
}

unpack() {
    mkdir -p "$work/source"
    # No documentation, no other architectures, and of drivers that a micro-VM cannot have only what Kconfig and make read.
    # The archive is compressed in blocks, so that all processors can unpack it.
    tar -C "$work/source" --strip-components=1 -I 'xz -d -T0' -xf "$SOURCE_TAR" \
        --wildcards --exclude='*/Documentation/[a-zA-Z]*/*' --exclude='*/drivers/gpu/drm/*/*.[ch]' \
        --exclude='*/tools/testing/*' --exclude='*/tools/perf/*' --exclude='*/sound/*/*.[ch]' --exclude='*/arch/[a-tv-wyz]*/*.*' \
        --exclude='*/drivers/net/[ew]*/*/*.[ch]' --exclude='*/drivers/media/*/*.[ch]' --exclude='*/drivers/staging/*/*.[ch]' \
        --exclude='*/drivers/iio/*/*.[ch]' --exclude='*/drivers/scsi/*/*.[ch]' --exclude='*/drivers/infiniband/*/*.[ch]' ||
        die "cannot unpack $SOURCE_TAR"
    local patch
    for patch in "$here"/patches/*.patch; do
        [[ -e $patch ]] || continue
        patch -d "$work/source" -p1 -s -f <"$patch" || die "$(basename "$patch") does not apply"
    done
}

configure() {
    cat "$here"/config/*.config >"$work/asked.config"
    kernel_make -s KCONFIG_ALLCONFIG="$work/asked.config" allnoconfig >"$work/configure.log" 2>&1 ||
        die "configuration failed: $(tail -n 3 "$work/configure.log")"
    kernel_make -s olddefconfig >>"$work/configure.log" 2>&1 || die "configuration failed: $(tail -n 3 "$work/configure.log")"
    verify_configuration "$work/asked.config" "$work/source/.config"
}

# Every symbol asked for must be as asked: Kconfig drops silently what a dependency forbids.
verify_configuration() {
    local asked=$1 got=$2 line symbol lost=0
    while IFS= read -r line; do
        case $line in
        CONFIG_*)
            grep -qxF -e "$line" "$got" && continue
            symbol=${line%%=*}
            ;;
        '# CONFIG_'*' is not set')
            symbol=${line#\# }
            symbol=${symbol%% *}
            grep -q "^$symbol=" "$got" || continue
            ;;
        *) continue ;;
        esac
        printf 'kernel: error: asked for "%s", got "%s"\n' "$line" \
            "$(grep -E "^(# )?$symbol[ =]" "$got" || echo "no $symbol")" >&2
        lost=1
    done <"$asked"
    ((lost == 0)) || die "configuration lost symbols"
}

# Precompiles what most files include, with the flags that most files get: see cc_with_common_headers.c.
precompile_headers() {
    export KOMBI_COMMON=$work/common
    mkdir -p "$KOMBI_COMMON"
    cat >"$KOMBI_COMMON/common.h" <<'END'
#include <linux/compiler-version.h>
#include <linux/kconfig.h>
#include <linux/compiler_types.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/mm.h>
#include <linux/fs.h>
#include <linux/slab.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/skbuff.h>
#include <linux/netdevice.h>
END
    # Names of the file being compiled: they may be defined only after the precompiled header.
    cat >"$KOMBI_COMMON/names.h" <<'END'
#define KBUILD_BASENAME KOMBI_BASENAME
#define KBUILD_MODNAME KOMBI_MODNAME
#define KBUILD_MODFILE KOMBI_MODFILE
#define __KBUILD_MODNAME KOMBI_MODNAME_TOKEN
END
    : >"$KOMBI_COMMON/flags"
    : >"$KOMBI_COMMON/common.h.gch"
    # Some ordinary file tells the flags.
    KOMBI_COMMON_FLAGS_TO=$work/flags kernel_make -s fs/namei.o >>"$work/configure.log" 2>&1 || return 0
    # The flags are words without quotes or blanks.
    # shellcheck disable=SC2046
    if (cd "$work/source" && gcc -w $(<"$work/flags") -x c-header "$KOMBI_COMMON/common.h" -o "$work/common.h.gch") \
        >>"$work/configure.log" 2>&1; then
        mv "$work/common.h.gch" "$KOMBI_COMMON/common.h.gch"
        mv "$work/flags" "$KOMBI_COMMON/flags"
    else
        say 'common headers do not precompile; building without'
        rm -f "$KOMBI_COMMON/common.h.gch"
    fi
}

compile() {
    local status
    # "  CC      file.o": one line a step.
    set +e
    kernel_make -j"$jobs" vmlinux bzImage 2>"$work/errors.log" |
        tee "$work/build.log" | progress "compiling with $jobs jobs" 2150
    status=${PIPESTATUS[0]}
    set -e
    ((status == 0)) || {
        tail -n 30 "$work/errors.log" >&2
        die "the kernel does not build"
    }
}

build_into() {
    local destination=$1
    say "unpacking $(dpkg-query -W -f '${Package} ${Version}' "$SOURCE_PACKAGE")"
    unpack
    gcc -O2 -o "$work/cc_with_common_headers" "$here/cc_with_common_headers.c" || die 'gcc does not work'
    configure
    precompile_headers
    compile
    # No debug information is built; symbols that only a debugger reads go too (a panic prints names from kallsyms).
    strip --strip-all -o "$destination/vmlinux" "$work/source/vmlinux"
    cp "$work/source/arch/x86/boot/bzImage" "$destination/bzImage"
    cp "$work/source/.config" "$destination/config"
    # Addresses and names, for profiles of the boot.
    cp "$work/source/System.map" "$destination/System.map"
    size -A "$work/source/vmlinux" >"$destination/size"
}

# Puts a file of the cache at its place in one step; a hard link where the file system permits.
place() {
    local from=$1 to=$2
    [[ ! $to -ef $from ]] || return 0
    if [[ -f $to ]] && cmp -s "$from" "$to"; then return 0; fi
    cp --reflink=auto "$from" "$to.$$"
    mv -f "$to.$$" "$to"
}

main() {
    install_missing
    local hash entry
    hash=$(input_hash)
    entry=$cache/$hash
    mkdir -p "$cache" "$output"

    if [[ ! -e $entry/vmlinux ]]; then
        exec 9>"$cache/$hash.lock"
        flock -n 9 || {
            say "waiting for another build of $hash"
            flock 9
        }
        # The other build may have made it meanwhile.
        if [[ ! -e $entry/vmlinux ]]; then
            if [[ -n ${KOMBI_KERNEL_KEEP:-} ]]; then
                work=$KOMBI_KERNEL_KEEP
                rm -rf "$work/source"
            else
                work=$(mktemp -d "$cache/build.XXXXXX")
                trap 'rm -rf "$work"' EXIT
            fi
            mkdir -p "$work/result"
            build_into "$work/result"
            rm -rf "$entry"
            mv -T "$work/result" "$entry"
        fi
        exec 9>&-
    else
        say "unchanged, from cache"
    fi

    place "$entry/vmlinux" "$output/vmlinux"
    place "$entry/bzImage" "$output/bzImage"
    say "$output/vmlinux: $(stat -c %s "$output/vmlinux") bytes"
}

main
