#!/usr/bin/env bash
# The main job, end to end: commands in micro-VMs, each in a Linux of its own,
# on the software engine, with the time of every step.
set -euo pipefail
cd "$(dirname "$0")/.."
kombi=target/release/kombi

step() {
    local title=$1 expected=$2 started ended status=0
    shift 2
    printf '\n\033[1m%s\033[0m\n$ %s\n' "$title" "${*@Q}"
    started=$(date +%s%N)
    "$@" || status=$?
    ended=$(date +%s%N)
    printf '\033[2m[exit code %d, %d ms]\033[0m\n' "$status" $(((ended - started) / 1000000))
    if [ "$status" -ne "$expected" ]; then
        printf 'demo: expected exit code %d\n' "$expected" >&2
        exit 1
    fi
}

step "What this host offers" 0 "$kombi" doctor
step "A command in a machine of its own (first run: the image's layer becomes EROFS)" 0 \
    "$kombi" run oci:target/demo/busybox echo "hello from a micro-VM"
step "Again, cached" 0 "$kombi" run oci:target/demo/busybox uname -a
step "Its exit code is the command's" 7 "$kombi" run oci:target/demo/busybox sh -c 'exit 7'
step "Signals come back as 128 + number" 143 "$kombi" run oci:target/demo/busybox sh -c 'kill -TERM $$'
step "Standard input goes in, environment too" 0 \
    bash -c "printf 'one\ntwo\n' | $kombi run -i -e GREETING=hi oci:target/demo/busybox sh -c 'echo \$GREETING; wc -l'"
step "Debian with Python" 0 "$kombi" run oci:target/demo/debian python3 -c 'print(sum(range(10**7)))'
step "Another user, another folder" 0 \
    "$kombi" run -u 65534:65534 -w /usr/lib oci:target/demo/debian sh -c 'id; pwd; cat /etc/debian_version'
printf '\ndemo: done\n'
