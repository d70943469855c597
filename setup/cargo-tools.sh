#!/usr/bin/env bash
# Installs the named cargo tools from their published sources when they are missing.
# usage: setup/cargo-tools.sh TOOL…
set -euo pipefail

for tool in "$@"; do
    command -v "$tool" >/dev/null && continue
    echo "setup: building $tool (once, some minutes)"
    cargo install --locked --quiet "$tool"
done
