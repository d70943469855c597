#!/usr/bin/env bash
# Runs programs out of Debian's packages in a guest, and in the same root on the host; what they print must be equal.
#
# usage: lab/guests/run.sh [--quick] [NAME…]      NAME: a file of programs/, default: all
#
# Each programs/NAME.sh says in its head which packages it needs, how much memory, as which user it runs (default: root)
# and how many seconds it may take in the guest (times GUESTS_PATIENCE, for busy hosts). It is run by sh -eu with /tmp
# empty; its standard output must depend on neither time nor place, its standard error is kept beside it. --quick is
# given on to it as $1 = quick.
# Everything printed is kept in target/guests/NAME.{guest,host}.{out,err}. The table's times are processor time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
results=$repository/target/guests
kombi=${KOMBI:-$repository/target/release/kombi}
host_seconds=600

say() { printf 'guests: %s\n' "$*"; }
die() { printf 'guests: error: %s\n' "$*" >&2; exit 1; }

size=full
if [ "${1:-}" = --quick ]; then
    size=quick
    shift
fi
[ -x "$kombi" ] || die "no $kombi; run make build"
[ $# -gt 0 ] || set -- $(cd "$here/programs" && printf '%s\n' *.sh | sed 's/\.sh$//')

# $1 name, $2 field, $3 default
field() {
    local value
    value=$(sed -n "s/^# $2: //p" "$here/programs/$1.sh")
    echo "${value:-${3:-}}"
}

packages=()
for name in "$@"; do
    [ -e "$here/programs/$name.sh" ] || die "no program $name in $here/programs"
    read -ra more <<<"$(field "$name" packages)"
    packages+=("${more[@]}")
done
place=$("$here/image.sh" "${packages[@]}")
# The disk made of the image stays beside it, out of the user's own image store.
export KOMBI_HOME=$place/store
mkdir -p "$results"

# What runs a script as PID 1's child: $1 script, $2 size, $3 user.
readonly START='
export HOME=/tmp LC_ALL=C.UTF-8 TZ=UTC PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ "$3" = root ]; then exec sh -euc "$1" program "$2"; fi
chmod 1777 /tmp
exec setpriv --reuid="$3" --regid="$3" --init-groups -- sh -euc "$1" program "$2"
'

in_guest() {
    timeout "$4" "$kombi" run --quiet --memory "$5" "oci:$place/image" sh -c "$START" start "$1" "$2" "$3"
}

# Its own processes, mounts and System V objects; the user is root of a namespace where it is nobody special outside.
in_host() {
    local within=(unshare --mount --pid --fork --kill-child --ipc --uts)
    [ "$(id -u)" -eq 0 ] || within+=(--map-root-user --map-auto)
    timeout "$host_seconds" "${within[@]}" sh -euc '
        root=$1
        shift
        mount --make-rprivate /
        mount --rbind /dev "$root/dev"
        mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
        mount -t tmpfs tmpfs "$root/tmp"
        exec chroot "$root" "$@"
    ' host "$place/root" sh -c "$START" start "$1" "$2" "$3"
}

# $1 function, $2 name, $3 where; the others are for the function. Prints the seconds of processor time.
timed() {
    local function=$1 file=$results/$2.$3 status=0 TIMEFORMAT='%U %S'
    shift 3
    { time "$function" "$@" >"$file.out" 2>"$file.err" </dev/null || status=$?; } 2>"$file.time"
    echo "$status" >"$file.status"
    awk '{ print $1 + $2 }' "$file.time"
}

# The image becomes a disk before anything is timed.
"$kombi" run --quiet "oci:$place/image" true || die "the image does not boot"

failed=0
table=$(printf '%-10s %-12s %9s %9s %12s' program result 'guest s' 'host s' guest/host)
for name in "$@"; do
    script=$(cat "$here/programs/$name.sh")
    user=$(field "$name" user root) limit=$(($(field "$name" limit 60) * ${GUESTS_PATIENCE:-1}))
    host=$(timed in_host "$name" host "$script" $size "$user")
    [ "$(cat "$results/$name.host.status")" = 0 ] ||
        die "$name fails on the host itself: see $results/$name.host.err"
    guest=$(timed in_guest "$name" guest "$script" $size "$user" "$limit" "$(field "$name" memory 512M)")
    status=$(cat "$results/$name.guest.status")
    if [ "$status" = 124 ]; then
        result="over $limit s"
    elif [ "$status" != 0 ]; then
        result="exit $status"
    elif ! cmp -s "$results/$name.host.out" "$results/$name.guest.out"; then
        result=differs
    else
        result=equal
    fi
    line=$(awk -v g="$guest" -v h="$host" -v n="$name" -v r="$result" \
        'BEGIN { printf "%-10s %-12s %9.1f %9.1f %12.2f", n, r, g, h, h ? g / h : 0 }')
    table+=$'\n'$line
    say "$line"
    if [ "$result" != equal ]; then
        failed=$((failed + 1))
        diff "$results/$name.host.out" "$results/$name.guest.out" | head -n 20 | sed 's/^/    /' || true
        tail -n 5 "$results/$name.guest.err" | sed 's/^/    guest: /'
        say "everything it printed: $results/$name.*"
    fi
done
[ $# -eq 1 ] || printf '\n%s\n' "$table"
[ "$failed" -eq 0 ] || die "$failed of $# failed"
