#!/usr/bin/env bash
# Builds soak.c and runs it in a machine with several processors.
#
#   run.sh [SECONDS [CPUS]]      default: 600 s on 2 processors

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kombi=$here/../../../target/release/kombi
seconds=${1:-600}
cpus=${2:-2}

[ -x "$kombi" ] || {
    printf 'soak: error: no %s; run make build\n' "$kombi" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/root"
# The disk made of the folder goes with it, and does not stay in the user's own image store.
export KOMBI_HOME=$work/store
gcc -O2 -static -pthread -Wall -Wextra -o "$work/root/soak" "$here/soak.c"
printf 'soak: %s s on %s processors\n' "$seconds" "$cpus" >&2
timeout $((seconds + 120)) "$kombi" run --cpus "$cpus" "rootfs:$work/root" /soak "$seconds"
