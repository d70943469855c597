#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# The compiler as the kernel's makefiles call it, with the headers that nearly every file includes parsed once.
# Two thirds of a kernel build is parsing them 1,600 times; build.sh passes this file as CC to stay within its time.
#
# KOMBI_COMMON (a directory) holds common.h, its precompiled form common.h.gch, names.h, and flags: the flags it was compiled
# with. A file is compiled with it only when that cannot change the result: its flags are the same, and it defines nothing but
# message prefixes before its first #include. Everything else, and whatever then fails, goes to gcc as it came.

common=${KOMBI_COMMON:-}

# Only "… -c -o FILE.o FILE.c" of the kernel proper.
source_file=${!#}
[[ -n $common && -e $common/common.h.gch && $source_file == *.c && $* == *" -c -o "* && $* == *-DKBUILD_MODNAME=* ]] || exec gcc "$@"

flags= depfile= object= skip=
rewritten=()
for argument in "$@"; do
    if [[ -n $skip ]]; then
        [[ $skip == object ]] && object=$argument && rewritten+=("$argument")
        skip=
        continue
    fi
    case $argument in
    -include) skip=include ;;
    -o) skip=object; rewritten+=(-o) ;;
    -Wp,-MMD,*) depfile=${argument#-Wp,-MMD,} ;;
    -D__KBUILD_MODNAME=*) rewritten+=("-DKOMBI_MODNAME_TOKEN=${argument#*=}") ;;
    -DKBUILD_*=*) rewritten+=("-DKOMBI_${argument#-DKBUILD_}") ;;
    # Warnings are the kernel developers' business.
    -W*) ;;
    -c | "$source_file") rewritten+=("$argument") ;;
    *) flags+=" $argument"; rewritten+=("$argument") ;;
    esac
done

[[ -n ${KOMBI_COMMON_FLAGS_TO:-} ]] && printf '%s\n' "$flags" >"$KOMBI_COMMON_FLAGS_TO"
[[ $flags == "$(<"$common/flags")" ]] || exec gcc "$@"

while IFS= read -r line; do
    case $line in
    '#include'*) break ;;
    '#define pr_fmt'* | '#define dev_fmt'* | '# define pr_fmt'*) ;;
    '#'*) exec gcc "$@" ;;
    esac
done <"$source_file"

if gcc -w -include "$common/common.h" -include "$common/names.h" "${rewritten[@]}" 2>/dev/null; then
    [[ -z $depfile ]] || printf '%s: %s\n' "$object" "$source_file" >"$depfile"
else
    exec gcc "$@"
fi
