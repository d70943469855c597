#!/usr/bin/env bash
# cargo-deny: licences, sources and bans always; advisories too where their
# database can be fetched, otherwise said and left out.
set -euo pipefail

cargo deny --log-level error check licenses sources bans
# Of the fuzz targets only libFuzzer is not in the list above.
(cd fuzz && cargo deny --log-level error --config ../deny.toml check licenses sources bans)
if cargo deny --log-level off fetch db 2>/dev/null; then
    cargo deny --log-level error check advisories
else
    echo "deny: the advisory database cannot be reached from here; advisories were not checked"
fi
