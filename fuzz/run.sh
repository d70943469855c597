#!/usr/bin/env bash
# Fuzzing guided by coverage: builds all targets, runs each for a time, two at once.
# What a run learned stays in target/fuzz/corpus, what broke a target in target/fuzz/found.
# usage: fuzz/run.sh SECONDS [TARGET…]      each target for so long; default: all
set -euo pipefail

cd "$(dirname "$0")"
seconds=${1:?"usage: fuzz/run.sh SECONDS [TARGET…]"}
shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for file in targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi
cargo build --release --locked -q

one() {
    local seconds=$1 target=$2 state=../target/fuzz
    local program=$state/x86_64-unknown-linux-gnu/release/$target
    local learned=$state/corpus/$target found=$state/found/$target log=$state/$target.log
    mkdir -p "$learned" "$found"
    # New inputs go to the first folder only: the seeds stay as they are.
    if ! "$program" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -max_len=4096 \
        -print_final_stats=1 -verbosity=1 -artifact_prefix="$found/" \
        "$learned" "corpus/$target" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "fuzz: $target broke: run $program again on the newest file in $found" >&2
        exit 1
    fi
    awk -v target="$target" '
        /INITED/ { before = $4 }
        /DONE/ { after = $4 }
        /^stat::number_of_executed_units/ { runs = $2 }
        END { printf "  %-14s %10d runs, %d edges reached (%d by the seeds)\n", target, runs, after, before }
    ' "$log"
}
export -f one

echo "fuzz: ${targets[*]}, each for $seconds s"
printf '%s\0' "${targets[@]}" | xargs -0 -n 1 -P 2 bash -c 'set -euo pipefail; one "$@"' run "$seconds"
