#!/usr/bin/env bash
# Builds soak.c and runs it in a machine with several processors.
#
#   run.sh [SECONDS [CPUS]]      default: 600 s on 2 processors

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kombi=$here/../../../target/release/kombi
seconds=${1:-600}
cpus=${2:-2}

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
gcc -O2 -static -pthread -Wall -Wextra -o "$root/soak" "$here/soak.c"
printf 'soak: %s s on %s processors\n' "$seconds" "$cpus" >&2
timeout $((seconds + 120)) "$kombi" run --cpus "$cpus" "rootfs:$root" /soak "$seconds"
